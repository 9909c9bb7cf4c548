/** Conditions on rows, as dashboards/tables/conditions.py has them: the same functions under the same names, without
 * their underscores. What is unknown is null; a truth is 1 or 0. */
const conditions = (() => {
  const ALIASES = { "backend.used": "backend", "backend.requested": "backend_requested" };
  const TOKEN = new RegExp(
    "\\s*(?:--[^\\n]*\\s*)*(?:"
    + "(?<number>(?:[0-9]+(?:\\.[0-9]*)?|\\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?![\\p{L}\\p{N}_.]))"
    + "|(?<text>'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\")"
    + "|(?:(?:tags|metrics|params)\\.)?(?:`(?<quoted>[^`]+)`|(?<name>[\\p{L}_][\\p{L}\\p{N}_.]*))"
    + "|(?<sign><=|>=|<>|!=|==|[=<>(),*/%+-])"
    + "|(?<end>$))", "uy");
  const KEYWORDS = new Set(["and", "or", "not", "in", "between", "like", "is", "null", "true", "false"]);
  const NUMBER = /^\s*[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*$/;
  const COMPARED = {
    "=": (order) => order === 0, "==": (order) => order === 0,
    "!=": (order) => order !== 0, "<>": (order) => order !== 0,
    "<": (order) => order < 0, "<=": (order) => order <= 0,
    ">": (order) => order > 0, ">=": (order) => order >= 0,
  };
  const COMPUTED = {
    "+": (a, b) => a + b, "-": (a, b) => a - b, "*": (a, b) => a * b, "/": (a, b) => a / b, "%": (a, b) => a % b,
  };
  const DEEPEST = 40;

  class ConditionError extends Error {}

  /** A function that tells whether a row meets the condition. Throws ConditionError. */
  function condition(text, columns, more = []) {
    const meaning = new Parser(text, columns, more).whole();
    return (row) => truth(meaning(row)) === 1;
  }

  class Parser {
    constructor(text, columns, more) {
      this.there = [...columns].sort();
      this.columns = new Map([...more, ...this.there].map((name) => [name.toLowerCase(), name]));
      this.tokens = tokens(text);
      this.place = 0;
      this.depth = 0;
      this.right = 0;
    }

    whole() {
      const found = this.any();
      if (this.kind !== "end") this.expected("and, or, or the end");
      return found;
    }

    any() {
      const parts = [this.all()];
      while (this.took("or")) parts.push(this.all());
      return parts.length === 1 ? parts[0] : (row) => either(parts.map((part) => truth(part(row))));
    }

    all() {
      const parts = [this.negated()];
      while (this.took("and") || this.beginsAnother()) parts.push(this.negated());
      return parts.length === 1 ? parts[0] : (row) => both(parts.map((part) => truth(part(row))));
    }

    beginsAnother() {
      return ["number", "text", "quoted", "name"].includes(this.kind) || this.is("not") || this.is("(");
    }

    negated() {
      if (!this.took("not")) return this.compared();
      const of = this.nested(() => this.negated());
      return (row) => opposite(truth(of(row)));
    }

    compared() {
      const [kind, said] = this.tokens[this.place];
      if (this.standsAlone(kind, said)) {
        this.place += 1;
        return kind === "number" ? ofTrial(said) : withWords(said);
      }
      const left = this.sum();
      for (const [sign, holds] of Object.entries(COMPARED)) {
        if (!this.took(sign)) continue;
        const right = this.operands(() => this.sum());
        return (row) => compare(left(row), right(row), holds);
      }
      if (this.took("is")) {
        const isNot = this.took("not");
        this.need("null");
        return (row) => Number((left(row) === null) !== isNot);
      }
      const isNot = this.is("not") && isRange(this.tokens[this.place + 1]);
      this.place += Number(isNot);
      const of = this.operands(() => this.ranged(left));
      return isNot ? (row) => opposite(truth(of(row))) : of;
    }

    standsAlone(kind, said) {
      const isSearch = kind === "number" || kind === "text" || (kind === "name" && !this.known(said));
      if (this.right || !isSearch) return false;
      const [next, what] = this.tokens[this.place + 1];
      if (next === "sign" && what === "(" && kind === "name") throw new ConditionError(`there is no function ${said}`);
      if (next === "keyword" && what === "not") return !isRange(this.tokens[this.place + 2]);
      return !isRange([next, what]) && !(next === "keyword" && what === "is") && !joins([next, what]);
    }

    ranged(left) {
      if (this.took("in")) {
        this.need("(");
        const among = [this.sum()];
        while (this.took(",")) among.push(this.sum());
        this.need(")");
        return (row) => either(among.map((one) => compare(left(row), one(row), COMPARED["="])));
      }
      if (this.took("between")) {
        const low = this.sum();
        this.need("and");
        const high = this.sum();
        return (row) => both([compare(left(row), low(row), COMPARED[">="]), compare(left(row), high(row), COMPARED["<="])]);
      }
      if (this.took("like")) {
        const pattern = this.sum();
        return (row) => isLike(left(row), pattern(row));
      }
      return left;
    }

    sum() {
      return this.chain(["+", "-"], () => this.chain(["*", "/", "%"], () => this.signed()));
    }

    chain(signs, operand) {
      let found = operand();
      while (signs.some((sign) => this.is(sign))) {
        found = computed(found, COMPUTED[this.next()[1]], this.operands(operand));
      }
      return found;
    }

    operands(rule) {
      this.right += 1;
      const found = rule();
      this.right -= 1;
      return found;
    }

    signed() {
      if (this.took("-")) return computed(() => 0, COMPUTED["-"], this.nested(() => this.signed()));
      if (this.took("(")) {
        const inner = this.nested(() => this.any());
        this.need(")");
        return inner;
      }
      return this.operand();
    }

    operand() {
      const [kind, said] = this.tokens[this.place];
      const constants = { null: null, true: 1, false: 0 };
      if (kind === "sign" || kind === "end" || (kind === "keyword" && !Object.hasOwn(constants, said))) {
        this.expected("a column or a value");
      }
      this.place += 1;
      if (kind === "keyword") return () => constants[said];
      if (kind === "number") return () => Number(said);
      if (kind === "text") return () => said;
      const name = this.known(said);
      if (!name) throw new ConditionError(`no column '${said}'; there are ${this.there.join(", ")}`);
      return (row) => value(row[name]);
    }

    known(said) {
      const lower = said.toLowerCase();
      return this.columns.get(Object.hasOwn(ALIASES, lower) ? ALIASES[lower] : lower) || "";
    }

    nested(rule) {
      this.depth += 1;
      if (this.depth > DEEPEST) throw new ConditionError(`more than ${DEEPEST} parentheses or signs within one another`);
      const found = rule();
      this.depth -= 1;
      return found;
    }

    get kind() {
      return this.tokens[this.place][0];
    }

    is(said) {
      return (this.kind === "sign" || this.kind === "keyword") && this.tokens[this.place][1] === said;
    }

    next() {
      this.place += 1;
      return this.tokens[this.place - 1];
    }

    took(said) {
      const isThere = this.is(said);
      this.place += Number(isThere);
      return isThere;
    }

    need(said) {
      if (!this.took(said)) this.expected(said);
    }

    expected(what) {
      const [kind, said] = this.tokens[this.place];
      throw new ConditionError(`expected ${what}, found ${kind === "end" ? "the end" : said}`);
    }
  }

  function isRange([kind, said]) {
    return kind === "keyword" && ["in", "between", "like"].includes(said);
  }

  function joins([kind, said]) {
    return kind === "sign" && (Object.hasOwn(COMPARED, said) || Object.hasOwn(COMPUTED, said));
  }

  function tokens(text) {
    const found = [];
    TOKEN.lastIndex = 0;
    while (!found.length || found.at(-1)[0] !== "end") {
      const place = TOKEN.lastIndex;
      const match = TOKEN.exec(text);
      if (match === null) {
        const rest = text.slice(place).trim();
        throw new ConditionError("'\"`".includes(rest[0]) ? `a text has no end: ${rest}` : `cannot read ${rest}`);
      }
      let [kind, said] = Object.entries(match.groups).find(([, content]) => content !== undefined);
      if (kind === "text") said = said.slice(1, -1).replaceAll(said[0] + said[0], said[0]);
      else if (kind === "name" && KEYWORDS.has(said.toLowerCase())) [kind, said] = ["keyword", said.toLowerCase()];
      found.push([kind, said]);
    }
    return found;
  }

  function value(found) {
    if (typeof found === "boolean") return Number(found);
    return typeof found === "number" || typeof found === "string" ? found : null;
  }

  function truth(found) {
    return found === null ? null : Number(typeof found === "string" ? found !== "" : found !== 0);
  }

  function opposite(found) {
    return found === null ? null : Number(found === 0);
  }

  function either(truths) {
    return truths.includes(1) ? 1 : truths.includes(null) ? null : 0;
  }

  function both(truths) {
    return truths.includes(0) ? 0 : truths.includes(null) ? null : 1;
  }

  function compare(left, right, holds) {
    if (left === null || right === null) return null;
    if (typeof left !== typeof right) {
      [left, right] = [asNumber(left), asNumber(right)];
      if (left === null || right === null) return Number(holds(-1) && holds(1));
    }
    return Number(holds(Number(left > right) - Number(left < right)));
  }

  function asNumber(found) {
    return typeof found === "number" ? found : NUMBER.test(found) ? Number(found) : null;
  }

  function computed(left, compute, right) {
    return (row) => {
      const one = left(row), other = right(row);
      if (typeof one !== "number" || typeof other !== "number") return null;
      const found = compute(one, other);
      return Number.isFinite(found) ? found : null;
    };
  }

  function isLike(found, pattern) {
    if (typeof found !== "string" || typeof pattern !== "string") return null;
    const escaped = (letter) => letter.replace(/[\\^$.*+?()[\]{}|/]/, "\\$&");
    const parts = [...pattern.toLowerCase()].map((letter) => ({ "%": ".*", _: "." })[letter] || escaped(letter));
    return Number(new RegExp(`^(?:${parts.join("")})$`, "su").test(found.toLowerCase()));
  }

  function ofTrial(number) {
    return (row) => compare(value(row.trial), Number(number), COMPARED["="]);
  }

  function withWords(said) {
    const wanted = words(said);
    return (row) => Number(Object.values(row).some((found) => typeof found === "string" && words(found).includes(wanted)));
  }

  function words(text) {
    return ` ${(text.toLowerCase().match(/[\p{L}\p{N}_]+/gu) || []).join(" ")} `;
  }

  return { condition, ConditionError };
})();
