"use strict";
// The front: which searchers are shown, and the schedule of the point that is pointed at.
(() => {
  const data = JSON.parse(document.getElementById("points-data").textContent);
  const svg = document.querySelector(".front svg");
  const panel = document.getElementById("point");
  const hidden = new Set();
  let current = null;
  let pinned = false;

  svg.setAttribute("tabindex", "0");
  svg.insertAdjacentHTML("beforeend", '<circle class="ring" r="7"/><circle class="ring" r="7"/>');
  const rings = svg.querySelectorAll(".ring");
  const visible = () => data.points.filter((point) => !hidden.has(point.searcher));

  function bars(values, most) {
    const step = 100 / values.length;
    const rects = values.map((value, i) => {
      const height = 100 * Math.min(value / most, 1);
      const place = `x="${i * step}" y="${100 - height}" width="${0.8 * step}" height="${height}"`;
      return `<rect ${place}><title>${text(data.layers[i])}: ${value}</title></rect>`;
    });
    return `<svg class="bars" viewBox="0 0 100 100" preserveAspectRatio="none">${rects.join("")}</svg>`;
  }

  function text(value) {
    const element = document.createElement("span");
    element.textContent = value;
    return element.innerHTML.replaceAll('"', "&quot;");
  }

  function show(point) {
    current = point;
    rings.forEach((ring, i) => {
      const y = point && point.place[i + 1];
      ring.style.display = y == null ? "none" : "";
      if (y != null) {
        ring.setAttribute("cx", point.place[0]);
        ring.setAttribute("cy", y);
      }
    });
    if (!point) return;
    const facts = [
      [data.measure, point.accuracy], ["bytes", point.bytes], ["smaller", point.ratio],
      ["KL", point.kl], ["MACs", point.macs],
    ];
    const numbers = facts.map(([name, value]) => `<span><i>${name}</i> ${value}</span>`).join("");
    const name = text(data.searchers[point.searcher]);
    const colour = `style="fill: var(--series-${point.searcher % 8})"`;
    panel.innerHTML = `<b>${name}, evaluation ${point.evaluation}</b>
      <div class="numbers">${numbers}</div>
      <small>channels kept, 0 to 1</small><div ${colour}>${bars(point.keep, 1)}</div>
      <small>weight bits, 0 to 8</small><div ${colour}>${bars(point.bits, 8)}</div>
      <div class="ends"><span>${text(data.layers[0])}</span><span>${text(data.layers.at(-1))}</span></div>`;
  }

  function nearest(event) {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = null;
    let distance = Infinity;
    for (const point of visible()) {
      for (const y of point.place.slice(1)) {
        const d = y == null ? Infinity : Math.hypot(point.place[0] - at.x, y - at.y);
        if (d < distance) [best, distance] = [point, d];
      }
    }
    return distance < 40 ? best : null;
  }

  function walk(by) {
    const order = visible().sort((a, b) => a.place[0] - b.place[0]);
    if (!order.length) return;
    const at = order.indexOf(current);
    show(order[at < 0 ? 0 : Math.min(Math.max(at + by, 0), order.length - 1)]);
  }

  show(null);
  svg.addEventListener("pointermove", (event) => {
    const point = pinned ? null : nearest(event);
    if (point && point !== current) show(point);
  });
  svg.addEventListener("click", (event) => {
    const point = nearest(event);
    pinned = Boolean(point) && !(pinned && point === current);
    if (point) show(point);
  });
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    pinned = true;
    walk(by);
  });
  for (const box of document.querySelectorAll("[data-searcher]")) {
    box.addEventListener("change", () => {
      const number = Number(box.dataset.searcher);
      if (box.checked) hidden.delete(number);
      else hidden.add(number);
      for (const part of svg.querySelectorAll(`[id^="accuracy-${number}-"], [id^="kl-${number}-"]`))
        part.style.display = box.checked ? "" : "none";
      if (current && hidden.has(current.searcher)) show(null);
    });
  }
})();
