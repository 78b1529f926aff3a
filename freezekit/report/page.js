"use strict";
(() => {
  const root = document.documentElement;
  const make = (tag, text, attributes) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    return made;
  };

  // tables that sort: a click orders by the column, the next one turns it round; unknown values stay last
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    const sort = (column) => {
      const head = heads[column], numeric = head.classList.contains("n") && column > 0;
      const now = head.getAttribute("aria-sort");
      const down = now === "none" ? numeric : now === "ascending";
      const value = (row) => {
        const cell = row.cells[column], raw = cell.dataset.v;
        return head.classList.contains("n") ? (raw === undefined ? NaN : Number(raw)) : cell.textContent;
      };
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => {
        if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
        const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
        return down ? -order : order;
      });
      body.append(...rows.map(([, row]) => row));
      for (const one of heads) one.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
    };
    heads.forEach((head, column) => {
      const button = make("button", head.textContent, { type: "button" });
      button.addEventListener("click", () => sort(column));
      head.replaceChildren(button);
      head.setAttribute("aria-sort", column ? "none" : "ascending");
    });
  }

  // heat maps: one cell of each can be tabbed to, arrow keys go on from there, and its numbers are read out
  const readout = document.getElementById("readout");
  for (const map of document.querySelectorAll("table.map")) {
    const rows = [...map.tBodies[0].rows].map((row) => [...row.querySelectorAll("td")]);
    let current = rows[0][0];
    current.tabIndex = 0;
    const show = (event) => { if (event.target.title) readout.textContent = event.target.title; };
    map.addEventListener("mouseover", show);
    map.addEventListener("focusin", show);
    map.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      const row = rows.findIndex((cells) => cells.includes(event.target));
      if (!step || row < 0) return;
      const next = (rows[row + step[0]] || [])[rows[row].indexOf(event.target) + step[1]];
      event.preventDefault();
      if (!next) return;
      current.removeAttribute("tabindex");
      current = next;
      current.tabIndex = 0;
      current.focus();
    });
  }

  // channels: the shift of each mean against the ratio of its spreads
  const shape = (parent, tag, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  };
  const digits = (value) => String(Number(value.toPrecision(3)));
  const nice = (most) => {  // marks of 1, 2 or 5 times a power of ten, three at most on a side
    const unit = 10 ** Math.floor(Math.log10(most / 3));
    const step = [1, 2, 5, 10].map((k) => k * unit).find((s) => most / s <= 3.001);
    return Array.from({ length: Math.floor(most / step) }, (_, k) => (k + 1) * step);
  };
  const shifts = (most) => {
    if (most <= 20) {
      const marks = nice(most);
      return { to: (x) => x / most, marks: [...marks.map((m) => -m).reverse(), 0, ...marks] };
    }
    const decades = Math.floor(Math.log10(most)), every = Math.ceil(decades / 2);
    const marks = [];
    for (let k = every; k <= decades; k += every) marks.push(10 ** k);
    return {
      to: (x) => Math.asinh(x) / Math.asinh(most), marks: [...marks.map((m) => -m).reverse(), 0, ...marks],
    };
  };
  const spreads = (most) => {  // most: of the absolute logarithm
    const to = (y) => Math.max(-1, Math.log(y) / most);
    if (most < Math.log(2)) {
      const marks = nice(Math.exp(most) - 1);
      return { to, marks: [...marks.map((m) => 1 - m).filter((m) => to(m) > -1), 1, ...marks.map((m) => 1 + m)] };
    }
    const every = Math.ceil(most / Math.log(2) / 3), marks = [];
    for (let k = every; k * Math.log(2) <= most; k += every) marks.push(2 ** k);
    return { to, marks: [...marks.map((m) => 1 / m), 1, ...marks] };
  };
  const draw = (svg, layer, small) => {
    const [width, height] = small ? [200, 130] : [560, 420];
    const [left, bottom, edge] = small ? [6, 6, 6] : [64, 52, 16];
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const farthest = (values, least) => values.reduce((most, v) => Math.max(most, Math.abs(v)), least);
    const across = shifts(farthest(layer.s, 1e-6) * 1.05);
    const up = spreads(farthest(layer.r.map((r) => Math.log(Math.max(r, 1e-300))), 1e-6) * 1.05);
    const x = (value) => left + ((across.to(value) + 1) / 2) * (width - left - edge);
    const y = (value) => edge + ((1 - up.to(value)) / 2) * (height - bottom - edge);
    for (const mark of small ? [0] : across.marks) {
      const at = { x1: x(mark), x2: x(mark), y1: edge, y2: height - bottom, class: mark ? "grid" : "zero" };
      shape(svg, "line", at);
      if (!small) shape(svg, "text", { x: x(mark), y: height - bottom + 18, "text-anchor": "middle" }, digits(mark));
    }
    for (const mark of small ? [1] : up.marks) {
      const at = { x1: left, x2: width - edge, y1: y(mark), y2: y(mark), class: mark === 1 ? "zero" : "grid" };
      shape(svg, "line", at);
      if (!small) shape(svg, "text", { x: left - 8, y: y(mark) + 4, "text-anchor": "end" }, `x${digits(mark)}`);
    }
    if (!small) {
      const middle = left + (width - left - edge) / 2;
      shape(svg, "text", { x: middle, y: height - 10, "text-anchor": "middle" }, "mean shift (sigma)");
      const side = `translate(14 ${edge + (height - bottom - edge) / 2}) rotate(-90)`;
      shape(svg, "text", { transform: side, "text-anchor": "middle" }, "spread");
    }
    layer.s.forEach((shift, k) => {
      const dot = shape(svg, "circle", { cx: x(shift).toFixed(1), cy: y(layer.r[k]).toFixed(1), r: small ? 1.5 : 3 });
      const which = layer.s.length === layer.c ? `channel ${k}: ` : "";
      if (!small) shape(dot, "title", {}, `${which}${digits(shift)} sigma, spread x${digits(layer.r[k])}`);
    });
  };
  const section = document.getElementById("channels");
  if (section) {
    const layers = JSON.parse(document.getElementById("data").textContent);
    const select = section.querySelector("select"), large = section.querySelector("svg");
    const thumbs = section.querySelector(".thumbs");
    const choose = (index) => {
      const layer = layers[index];
      select.value = String(index);
      draw(large, layer, false);
      const shown = layer.s.length === layer.c ? "" : `, ${layer.s.length} of them shown`;
      const said = `${layer.n}: ${layer.c} channels${shown}, mean shift up to ${layer.m} sigma, spread ${layer.v}`;
      large.setAttribute("aria-label", said);
      section.querySelector(".said").textContent = said;
      [...thumbs.children].forEach((one, k) => one.setAttribute("aria-pressed", String(k === index)));
    };
    layers.forEach((layer, k) => select.append(make("option", `${layer.n} (${layer.m} sigma)`, { value: k })));
    select.addEventListener("change", () => choose(Number(select.value)));
    layers.slice(0, 6).forEach((layer, k) => {
      const button = make("button", undefined, { type: "button" });
      button.append(make("span", layer.n, { class: "name" }), make("span", `${layer.m} sigma`, { class: "dim" }));
      draw(shape(button, "svg", { "aria-hidden": "true" }), layer, true);
      button.addEventListener("click", () => choose(k));
      thumbs.append(button);
    });
    root.classList.add("js");  // an element that is not shown has no size
    choose(0);
  }
  root.classList.add("js");
})();
