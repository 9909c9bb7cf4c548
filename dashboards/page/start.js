document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chosen.pinned) chosen.pin(chosen.pinned);
});
chart.start();
table.start();
sources.fillFront();
