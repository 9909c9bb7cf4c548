/** Axes: which values they span, where a value lies, and what is written beside them. Nothing here draws. */
const scales = (() => {
  const LEAST_REACH = 1.2, MOST_REACH = 3.5; // of the width of the front, beyond its ends

  /** An axis. values: of all trials; front: of the front, ends of intervals included; kind: "linear" or "log", which is
   * symmetric about 0 and linear near it where a value is not above 0. */
  function axis(values, front, { all, log }) {
    const bend = bending([...values, ...front], log);
    const [low, high] = span(values.map(bend.to), front.map(bend.to), all);
    return {
      at: (value) => (bend.to(value) - low) / (high - low),
      covers: (value) => bend.to(value) >= low && bend.to(value) <= high,
      ticks: (most) => bend.ticks(bend.from(low), bend.from(high), most),
      note: bend.note,
    };
  }

  /** The front and its intervals, and nine in ten of the trials as long as the front keeps an eighth of the axis. */
  function span(values, front, all) {
    let low = Math.min(...values, ...front), high = Math.max(...values, ...front);
    const best = Math.min(...front), worst = Math.max(...front);
    if (!all && worst > best) {
      const distances = values.map((value) => Math.max(best - value, value - worst, 0)).sort((a, b) => a - b);
      const most = distances[Math.ceil(0.9 * distances.length) - 1];
      const reach = Math.min(Math.max(most, LEAST_REACH * (worst - best)), MOST_REACH * (worst - best));
      const near = values.filter((value) => value >= best - reach && value <= worst + reach);
      low = Math.min(best, ...near);
      high = Math.max(worst, ...near);
    }
    const margin = 0.05 * (high - low) || 0.1 * Math.abs(low) || 1;
    return [low - margin, high + margin];
  }

  function bending(values, log) {
    if (!log) return { to: (value) => value, from: (value) => value, ticks: linearTicks, note: "" };
    if (Math.min(...values) > 0) return { to: Math.log10, from: (place) => 10 ** place, ticks: logTicks, note: "log" };
    const sizes = values.map(Math.abs).filter((size) => size > 0).sort((a, b) => a - b);
    const unit = sizes.length ? 10 ** Math.floor(Math.log10(sizes[Math.floor(sizes.length / 4)])) : 1;
    return {
      to: (value) => Math.asinh(value / unit),
      from: (place) => unit * Math.sinh(place),
      ticks: (low, high, most) => symmetricTicks(low, high, most, unit),
      note: `log, linear near 0`,
    };
  }

  function linearTicks(low, high, most) {
    const rough = (high - low) / most;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  }

  /** 1, 2 and 5 times powers of ten, or these alone where there are too many; linear ones within less than half of one. */
  function logTicks(low, high, most) {
    if (high / low < 4) return linearTicks(low, high, most);
    return fewest([[1, 2, 5], [1, 3], [1]].map((digits) => powers(low, high, digits)), most);
  }

  function symmetricTicks(low, high, most, unit) {
    const choices = [[1, 2, 5], [1, 3], [1]].map((digits) => [
      ...powers(unit, -low, digits).map((value) => -value).reverse(),
      ...(low <= 0 && high >= 0 ? [0] : []),
      ...powers(unit, high, digits),
    ]);
    const found = fewest(choices, most).filter((value) => value >= low && value <= high);
    return found.length > 2 ? found : linearTicks(low, high, most);
  }

  function powers(low, high, digits) {
    const found = [];
    if (!(high > 0)) return found;
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const digit of digits) {
        const value = Number((digit * 10 ** power).toPrecision(6));
        if (value >= low && value <= high) found.push(value);
      }
    }
    return found;
  }

  /** The first choice that has no more than so many; else every other, third, ... of the last. */
  function fewest(choices, most) {
    const last = choices.at(-1);
    const step = Math.ceil(last.length / most);
    return choices.find((ticks) => ticks.length <= most) || last.filter((_, i) => i % step === 0);
  }

  /** Where labels go, so that none covers another, a mark or the edge, nor one of the others where that can be: null for
   * one that has no room. marks: { x, y, size, text }, the first first; others: { x, y }; box: left, right, top, bottom.
   * Each place is the label's left end and baseline. */
  function labelPlaces(marks, others, box, letter = 8.5, height = 13) {
    const taken = marks.map(({ x, y, size }) => [x - size, y - size, x + size, y + size]);
    const better = others.map(({ x, y }) => [x - 4, y - 4, x + 4, y + 4]);
    return marks.map(({ x, y, size, text }) => {
      const width = letter * text.length, near = size + 2;
      const places = [
        [x + near, y - near], [x + near, y + near + height - 4], [x - near - width, y - near],
        [x - near - width, y + near + height - 4], [x + near + 2, y + 4], [x - near - width - 2, y + 4],
        [x - width / 2, y - near - 2], [x - width / 2, y + near + height - 2],
      ];
      const isFree = (boxes) => ([left, base]) => {
        const [l, t, r, b] = [left, base - height + 3, left + width, base + 1];
        if (l < box.left || r > box.right || t < box.top || b > box.bottom) return false;
        return boxes.every(([left2, top2, right2, bottom2]) => r < left2 || l > right2 || b < top2 || t > bottom2);
      };
      const free = places.find(isFree([...taken, ...better])) || places.find(isFree(taken));
      if (!free) return null;
      taken.push([free[0], free[1] - height + 3, free[0] + width, free[1] + 1]);
      return free;
    });
  }

  return { axis, labelPlaces };
})();
