"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const words = {nan: NaN, inf: Infinity, "-inf": -Infinity};
const number = value => typeof value === "string" ? words[value] : value;
const numbers = values => values.map(number);
const find = id => document.getElementById(id);
const space = document.querySelector("svg").namespaceURI;
const MARKS = 6;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// The number of which `log` is the natural logarithm, also where no float holds it.
function power(log, digits = 3) {
  if (log === undefined || Number.isNaN(log)) return "–";
  if (log === -Infinity) return "0";
  if (log === Infinity) return "inf";
  const decades = log / Math.LN10;
  if (Math.abs(decades) < 3) return (10 ** decades).toPrecision(digits);
  let whole = Math.floor(decades), mantissa = (10 ** (decades - whole)).toPrecision(digits);
  if (mantissa.startsWith("10")) { mantissa = (1).toPrecision(digits); whole += 1; }
  return `${mantissa}e${whole}`;
}

function plain(value) {
  if (value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
  return value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential(2) : value.toPrecision(4);
}

function complex(re, im) {
  return im === 0 ? plain(re) : `${plain(re)} ${im < 0 ? "−" : "+"} ${plain(Math.abs(im))}i`;
}

// Where `t` is among ascending times, or the nearest one.
function nearest(times, t) {
  let low = 0, high = times.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (times[middle] < t) low = middle + 1; else high = middle;
  }
  return low > 0 && t - times[low - 1] < times[low] - t ? low - 1 : low;
}

// dh_t/dh_{t-1}, as it is written.
const jacobian = () => ["dh", make("sub", {}, "t"), "/dh", make("sub", {}, "t-1")];

function extent(values, least) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (Number.isFinite(v)) { low = Math.min(low, v); high = Math.max(high, v); }
  if (low > high) return [0, 1];
  const room = Math.max(least - (high - low), 0.08 * (high - low)) / 2;
  return [low - room, high + room];
}

function ticks(low, high, most, whole = false) {
  const rough = (high - low) / most, scale = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map(k => k * scale).find(s => s >= rough);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return found;
}

const decade = v => Number.isInteger(Math.round(v * 1e9) / 1e9)
  ? draw("tspan", {}, "10", draw("tspan", {dy: "-0.45em", "font-size": "75%"}, `${Math.round(v)}`.replace("-", "−")))
  : draw("tspan", {}, power(v * Math.LN10, 2));
const linear = v => draw("tspan", {}, `${Number(v.toPrecision(6))}`.replace("-", "−"));

// Empties the drawing and gives it axes; X and Y lead from numbers to pixels.
function axes(svg, {x, y, xLabel, yLabel, decades = false, square = false}) {
  const width = Math.max(svg.clientWidth, 200);
  const box = {left: 66, right: 12, top: 12, bottom: 44};
  const height = square ? width - box.left - box.right + box.top + box.bottom : svg.clientHeight || 280;
  if (square) svg.style.height = `${height}px`;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const right = width - box.right, bottom = height - box.bottom;
  const X = v => box.left + (v - x[0]) / (x[1] - x[0]) * (right - box.left);
  const Y = v => bottom - (v - y[0]) / (y[1] - y[0]) * (bottom - box.top);
  const shades = draw("g"), grid = draw("g", {class: "grid"}), layer = draw("g");
  for (const v of ticks(...x, square ? 6 : width < 420 ? 4 : 8, !square)) {
    grid.append(draw("line", {x1: X(v), x2: X(v), y1: box.top, y2: bottom}),
      draw("text", {x: X(v), y: bottom + 16, "text-anchor": "middle"}, linear(v)));
  }
  for (const v of ticks(...y, 6, decades && y[1] - y[0] > 3)) {
    grid.append(draw("line", {x1: box.left, x2: right, y1: Y(v), y2: Y(v)}),
      draw("text", {x: box.left - 6, y: Y(v) + 4, "text-anchor": "end"}, (decades ? decade : linear)(v)));
  }
  grid.append(draw("text", {x: (box.left + right) / 2, y: height - 8, "text-anchor": "middle"}, xLabel),
    draw("text", {transform: `translate(12 ${(box.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle"}, yLabel));
  svg.append(shades, grid, layer);
  return {svg, X, Y, layer, shades, x, y, left: box.left, right, top: box.top, bottom,
    time: pixel => x[0] + (pixel - box.left) / (right - box.left) * (x[1] - x[0])};
}

function path(on, at, values, attributes) {
  let d = "", pen = false;
  for (let i = 0; i < at.length; i++) {
    const known = Number.isFinite(values[i]);
    if (known) d += `${pen ? "L" : "M"}${on.X(at[i]).toFixed(1)} ${on.Y(values[i]).toFixed(1)}`;
    pen = known;
  }
  on.layer.append(draw("path", {d, fill: "none", ...attributes}));
}

function band(on, at, low, high, attributes) {
  let run = [];
  const close = () => {
    if (run.length > 1) {
      const there = run.map(i => `${on.X(at[i]).toFixed(1)} ${on.Y(high[i]).toFixed(1)}`);
      const back = run.reverse().map(i => `${on.X(at[i]).toFixed(1)} ${on.Y(low[i]).toFixed(1)}`);
      on.layer.append(draw("path", {d: `M${[...there, ...back].join("L")}Z`, ...attributes}));
    }
    run = [];
  };
  at.forEach((_, i) => Number.isFinite(low[i]) && Number.isFinite(high[i]) ? run.push(i) : close());
  close();
}

// A mark of its own for each series, told apart without colour too.
function mark(on, kind, x, y, attributes) {
  const s = 4;
  const shape = ["circle", "M-4 -4H4V4H-4Z", "M0 -5L5 4H-5Z", "M0 -5L5 0L0 5L-5 0Z", "M-4 -4L4 4M-4 4L4 -4", "M0 -5V5M-5 0H5"][kind % MARKS];
  const place = {transform: `translate(${on.X(x).toFixed(1)} ${on.Y(y).toFixed(1)})`, ...attributes};
  const element = shape === "circle" ? draw("circle", {r: s, ...place}) : draw("path", {d: shape, ...place});
  on.layer.append(element);
  return element;
}

// What is nearest to the pointer says what it is; `tell(x, y)`, in pixels of the drawing, gives a text or nothing.
function hover(svg, tell, press) {
  const tip = make("div", {class: "tip", hidden: ""});
  svg.parentElement.append(tip);
  const local = event => {
    const box = svg.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  svg.addEventListener("pointermove", event => {
    const [x, y] = local(event), text = tell(x, y);
    if (press && event.buttons) press(x, y);
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const wide = svg.clientWidth;
    tip.style.left = `${Math.max(0, Math.min(x + 12, wide - tip.offsetWidth))}px`;
    tip.style.top = `${y + 14}px`;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
  if (press) svg.addEventListener("pointerdown", event => press(...local(event)));
}

function closest(points, x, y) {
  let found = null, least = 20 ** 2;
  for (const p of points) {
    const far = (p.x - x) ** 2 + (p.y - y) ** 2;
    if (far < least) { least = far; found = p; }
  }
  return found;
}

function table(place, caption, names, rows) {
  const cell = (tag, attributes, text) => make(tag, attributes, text);
  place.replaceChildren(make("table", {class: "numbers", role: "table"},
    make("caption", {}, caption),
    make("thead", {role: "rowgroup"}, make("tr", {role: "row"},
      ...names.map(name => cell("th", {scope: "col", role: "columnheader"}, name)))),
    make("tbody", {role: "rowgroup"}, ...rows.map(row => make("tr", {role: "row"}, ...row.map((text, i) => i
      ? cell("td", {role: "cell", "data-name": names[i]}, text)
      : cell("th", {scope: "row", role: "rowheader"}, text)))))));
}

// A group of checkboxes; `boxes` are [key, label, checked, swatch]. Nobody can switch off the last one.
function toggles(fieldset, boxes, changed) {
  const chosen = new Set(boxes.filter(b => b[2]).map(b => b[0]));
  fieldset.hidden = boxes.length < 2;
  for (const [key, label, checked, swatch] of boxes) {
    const box = make("input", {type: "checkbox"});
    box.checked = checked;
    box.addEventListener("change", () => {
      if (box.checked) chosen.add(key); else chosen.delete(key);
      if (!chosen.size) { chosen.add(key); box.checked = true; }
      changed();
    });
    fieldset.append(make("label", {}, box, ...(swatch ? [swatch] : []), make("bdi", {}, label)));
  }
  return chosen;
}

function swatch(i) {
  const svg = draw("svg", {class: `swatch series-${i % MARKS}`, viewBox: "0 0 28 12", "aria-hidden": "true"});
  const on = {X: v => v, Y: v => v, layer: svg};
  svg.append(draw("path", {d: "M0 6H28", class: "line"}));
  mark(on, i, 14, 6, {class: "dot"});
  return svg;
}

function slider(input, told, say) {
  let waiting = 0;
  return () => {
    const text = say(), first = told.textContent === "";
    input.setAttribute("aria-valuetext", text.split(":")[0]);
    clearTimeout(waiting);
    // A screen reader is told where the slider rests, not every place that it passes.
    if (first) told.textContent = text; else waiting = setTimeout(() => { told.textContent = text; }, 120);
  };
}

const redraws = [];

function flows() {
  const found = data.flows.map((flow, i) => ({
    ...flow, i,
    curves: Object.fromEntries(Object.entries(flow.curves).map(([name, c]) => [name,
      Object.fromEntries(Object.entries(c).map(([of, v]) => [of, of === "rows" ? v.map(numbers) : numbers(v)]))])),
    spectra: (flow.spectra || []).map(s => ({
      steps: s.steps, singular: s.singular.map(numbers), eigenvalues: s.eigenvalues.map(numbers)})),
  }));
  const longest = Math.max(...found.map(f => f.steps)), most = Math.max(...found.map(f => f.sequences));
  const time = find("flows-time"), quantity = find("flows-quantity");
  const spectral = found.some(f => f.spectra.some(s => s.steps.length));
  time.max = longest;
  time.value = longest;
  for (const [key, text] of Object.entries(data.quantities)) {
    if (found.some(f => f.curves[key])) quantity.append(make("option", {value: key}, text));
  }
  const names = toggles(find("flows-names"), found.map(f => [f.i, f.name, true, swatch(f.i)]), () => all());
  const shown = Math.max(...found.map(f => f.curves.adjoint.rows.length));
  const boxes = most > 1 ? [["all", `median and middle 80 % of ${most}`, true]] : [];
  for (let i = 0; i < shown; i++) boxes.push([i, `sequence ${i + 1}`, most === 1]);
  const rows = toggles(find("flows-rows"), boxes, () => all());
  const leafNames = [...new Set(found.flatMap(f => f.leaves))];
  const leaves = toggles(find("flows-leaves"),
    leafNames.length ? [["", "the whole state", true], ...leafNames.map(n => [n, n, false])] : [], () => all());

  // Every curve that is switched on: where it is from, its times and natural logarithms.
  function lines() {
    const result = [];
    for (const flow of found.filter(f => names.has(f.i))) {
      for (const leaf of quantity.value === "signal" && leafNames.length ? leaves : [""]) {
        const curve = flow.curves[leaf ? `leaf:${leaf}` : quantity.value];
        if (!curve) continue;
        const first = quantity.value === "adjoint" || quantity.value === "contribution" ? 1 : 0;
        const at = flow.at.map(k => k + first);
        for (const row of rows) {
          const values = row === "all" ? curve.median || curve.rows[0] : curve.rows[row];
          if (!values || row === "all" && flow.sequences === 1 && rows.has(0)) continue;
          const of = flow.sequences === 1 ? "" : row === "all" ? "median" : `sequence ${row + 1}`;
          result.push({flow, leaf, row, at, values, of, low: row === "all" && curve.low, high: row === "all" && curve.high,
            label: [flow.name, leaf, of].filter(Boolean).join(", ")});
        }
      }
    }
    return result;
  }

  // The spectra that are shown: of the sequences that are switched on, else of the first.
  function spectra() {
    const t = Number(time.value), result = [];
    for (const flow of found.filter(f => names.has(f.i) && f.spectra.length)) {
      let chosen = [...rows].filter(r => r !== "all" && flow.spectra[r]);
      if (!chosen.length) chosen = [0];
      for (const row of chosen) {
        const s = flow.spectra[row];
        if (!s.steps.length) continue;
        const k = nearest(s.steps, t), of = flow.sequences === 1 ? "" : `sequence ${row + 1}`;
        result.push({flow, row, t: s.steps[k], singular: s.singular[k], eigenvalues: s.eigenvalues[k],
          label: [flow.name, of].filter(Boolean).join(", ")});
      }
    }
    return result;
  }

  const at = (line, t) => {
    if (t < line.at[0] || t > line.at[line.at.length - 1]) return [t, undefined];
    const i = nearest(line.at, t);
    return [line.at[i], line.values[i]];
  };
  let curve = null, cursor = null, dots = [], values = [], current = [];

  function drawCurve() {
    current = lines();
    const logs = current.map(l => l.values.map(v => v / Math.LN10));
    const bands = current.flatMap(l => [l.low || [], l.high || []]).flat().map(v => v / Math.LN10);
    curve = axes(find("flows-curve"), {x: [0, longest], y: extent([...logs.flat(), ...bands], 0.5), decades: true,
      xLabel: "time step t", yLabel: quantity.value === "adjoint" ? "gradient norm" : "norm"});
    shade();
    current.forEach((line, i) => {
      const series = `series-${line.flow.i % MARKS}`, of = `${line.leaf ? "leaf " : ""}${line.row === "all" ? "" : "single "}`;
      if (line.low) band(curve, line.at, line.low.map(v => v / Math.LN10), line.high.map(v => v / Math.LN10), {class: `${series} band`});
      path(curve, line.at, logs[i], {class: `${series} line ${of}`, "data-name": line.label});
    });
    cursor = draw("line", {class: "cursor", y1: curve.top, y2: curve.bottom});
    curve.layer.append(cursor);
    const words = quantity.selectedOptions[0].textContent;
    find("flows-curve-caption").textContent = `${words[0].toUpperCase()}${words.slice(1)}: on a logarithmic scale, against time t.` +
      (current.some(l => l.low) ? " Band: the middle 80 % of the sequences." : "") +
      (curve.shades.querySelector("rect") ? " Grey: padding." : "") +
      (curve.shades.querySelector("line") ? " Dotted: a reset, after which a new piece begins." : "");
  }

  function shade() {
    const regions = new Map(), begins = new Map();
    for (const flow of found.filter(f => names.has(f.i))) {
      const of = [...rows].filter(r => r !== "all" && flow.padded[r]);
      const chosen = of.length && !rows.has("all") ? of : flow.padded.map((_, i) => i);
      for (const i of chosen) {
        for (const [a, b] of flow.padded[i]) {
          const key = `${a} ${b}`;
          regions.set(key, {a, b, share: Math.max(regions.get(key)?.share || 0, 1 / chosen.length)});
        }
        for (const t of flow.resets[i]) begins.set(t, Math.max(begins.get(t) || 0, 1 / chosen.length));
      }
    }
    for (const {a, b, share} of regions.values()) {
      curve.shades.append(draw("rect", {class: "padding", x: curve.X(a - 1), width: curve.X(b) - curve.X(a - 1),
        y: curve.top, height: curve.bottom - curve.top, "fill-opacity": Math.max(0.15, share)}));
    }
    for (const [t, share] of begins) {
      curve.shades.append(draw("line", {class: "reset", x1: curve.X(t - 1), x2: curve.X(t - 1), y1: curve.top, y2: curve.bottom,
        "stroke-opacity": Math.max(0.35, share)}));
    }
  }

  const everything = found.flatMap(f => f.spectra);
  const largest = everything.reduce((m, s) => s.singular.flat().reduce((n, v) => Number.isFinite(v) ? Math.max(n, v) : n, m), 1);
  const gains = everything.flatMap(s => s.singular.flat()).filter(v => v > 1e-6 * largest).map(Math.log10);
  const reach = everything.reduce((m, s) => s.eigenvalues.reduce((n, row) =>
    row.reduce((k, v, i) => i % 2 || !Number.isFinite(v + row[i + 1]) ? k : Math.max(k, 1.05 * Math.hypot(v, row[i + 1])), n), m), 1.25);
  const size = everything.reduce((m, s) => s.singular.reduce((n, row) => Math.max(n, row.length), m), 1);
  const gainRange = extent([...gains, 0], 0.5);

  function drawSpectra(moving) {
    const sv = axes(find("flows-singular"), {x: [0.5, size + 0.5], y: gainRange, decades: true,
      xLabel: "number, by size", yLabel: "singular value"});
    const plane = axes(find("flows-plane"), {x: [-reach, reach], y: [-reach, reach], square: true, xLabel: "Re λ", yLabel: "Im λ"});
    sv.layer.append(draw("line", {class: "one", x1: sv.left, x2: sv.right, y1: sv.Y(0), y2: sv.Y(0)}));
    plane.layer.append(draw("circle", {class: "circle", cx: plane.X(0), cy: plane.Y(0), r: plane.X(1) - plane.X(0)}));
    dots = [];
    values = [];
    for (const s of moving) {
      const series = `series-${s.flow.i % MARKS}`, ranks = s.singular.map((_, i) => i + 1);
      const heights = s.singular.map(v => Number.isFinite(v) ? Math.max(v > 0 ? Math.log10(v) : -Infinity, gainRange[0]) : NaN);
      path(sv, ranks, heights, {class: `${series} line single`});
      ranks.forEach((rank, i) => {
        if (!Number.isFinite(heights[i])) return;
        if (size <= 40) mark(sv, s.flow.i, rank, heights[i], {class: `${series} dot`});
        values.push({x: sv.X(rank), y: sv.Y(heights[i]), text: `${s.label}, t = ${s.t}\nsingular value ${rank}: ${plain(s.singular[i])}`});
      });
      for (let i = 0; i < s.eigenvalues.length; i += 2) {
        const [re, im] = [s.eigenvalues[i], s.eigenvalues[i + 1]];
        if (!Number.isFinite(re + im)) continue;
        mark(plane, s.flow.i, re, im, {class: `${series} dot`});
        dots.push({x: plane.X(re), y: plane.Y(im),
          text: `${s.label}, t = ${s.t}\nλ = ${complex(re, im)}\n|λ| = ${plain(Math.hypot(re, im))}`});
      }
    }
    const steps = [...new Set(moving.map(s => s.t))].join(", ");
    const of = moving.some(s => s.flow.sequences > 1) ? `, of ${[...new Set(moving.map(s => `sequence ${s.row + 1}`))].join(", ")}` : "";
    const caption = (id, what, rest) => find(id).replaceChildren(
      ...(moving.length ? [`${what} of `, ...jacobian(), ` at t = ${steps}${of}${rest}`] : ["No spectra here."]));
    caption("flows-singular-caption", "Singular values", ". Red line: 1.");
    caption("flows-plane-caption", "Eigenvalues", ", and the unit circle.");
  }

  const what = () => quantity.selectedOptions[0].textContent.split(/[:,]| ‖/)[0];

  function told() {
    const t = Number(time.value);
    const parts = current.slice(0, 6).map(line => `${line.label} ${power(at(line, t)[1])}`);
    return `t = ${t} of ${longest}: ${what()} ${parts.join("; ")}`;
  }

  function tables(moving) {
    const t = Number(time.value);
    const names = ["curve", "t", what(), ...(spectral ? ["spectrum at t", "largest singular value", "smallest", "largest |λ|"] : [])];
    table(find("flows-values"), "Values at this step", names, current.map(line => {
      const [when, value] = at(line, t), s = moving.find(m => m.flow === line.flow && (m.row === line.row || line.row === "all"));
      const cells = [line.label, `${when}`, power(value)];
      if (spectral) cells.push(...(s ? [`${s.t}`, plain(s.singular[0]), plain(s.singular[s.singular.length - 1]),
        plain(Math.hypot(s.eigenvalues[0], s.eigenvalues[1]))] : ["–", "–", "–", "–"]));
      return cells;
    }));
    if (find("flows-table").closest("details").open) {
      const every = Math.ceil(longest / 200), times = [];
      for (let k = longest; k >= 0; k -= every) times.unshift(k);
      table(find("flows-table"), every > 1 ? `Every ${every} steps` : "At every step", ["t", ...current.map(l => l.label)],
        times.map(k => [`${k}`, ...current.map(l => power(at(l, k)[1]))]));
    }
    if (find("flows-spectrum").closest("details").open) {
      table(find("flows-spectrum"), "By size", ["curve", "t", "number", "singular value", "eigenvalue", "|λ|"],
        moving.flatMap(s => s.singular.map((v, i) => [s.label, `${s.t}`, `${i + 1}`, plain(v),
          complex(s.eigenvalues[2 * i], s.eigenvalues[2 * i + 1]), plain(Math.hypot(s.eigenvalues[2 * i], s.eigenvalues[2 * i + 1]))])));
    }
  }

  const say = slider(time, find("flows-told"), told);

  function move() {
    const moving = spectra(), x = curve.X(Number(time.value));
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    if (spectral) drawSpectra(moving);
    tables(moving);
    say();
  }

  function all() {
    find("flows-leaves").hidden = !leafNames.length || quantity.value !== "signal";
    drawCurve();
    move();
  }

  const set = x => {
    time.value = Math.round(curve.time(x));
    move();
  };
  time.addEventListener("input", move);
  quantity.addEventListener("change", all);
  for (const details of document.querySelectorAll("#flows details")) details.addEventListener("toggle", move);
  hover(find("flows-curve"), x => {
    const t = Math.round(curve.time(x));
    if (t < 0 || t > longest) return "";
    return [`t = ${t}`, ...current.slice(0, 8).map(l => `${l.label}: ${power(at(l, t)[1])}`)].join("\n");
  }, set);
  hover(find("flows-singular"), (x, y) => closest(values, x, y)?.text);
  hover(find("flows-plane"), (x, y) => closest(dots, x, y)?.text);
  find("flows-spectra").hidden = !spectral;
  redraws.push(all);
}

function control(part, label, most, value) {
  const id = `${part.dataset.key}-${label.replace(/\W+/g, "-")}`;
  const input = make("input", {type: "range", id, min: 0, max: most, step: 1});
  input.value = value;
  part.querySelector(".controls").append(make("div", {class: "time"}, make("label", {for: id}, label), input));
  return input;
}

function output(part) {
  const told = make("output", {"aria-live": "polite", "aria-atomic": "true"});
  part.querySelector(".controls").append(told);
  return told;
}

function modes(part, {labels, rows}) {
  const all = rows.map(numbers), svg = part.querySelector("svg");
  const reach = all.reduce((m, row) => row.reduce((k, v, i) => i % 2 || !Number.isFinite(v + row[i + 1]) ? k
    : Math.max(k, 1.05 * Math.hypot(v, row[i + 1])), m), 1.25);
  const which = control(part, labels[0].replace(/ \d.*/, ""), labels.length - 1, 0), told = output(part);
  which.parentElement.hidden = labels.length < 2;
  let dots = [];
  const say = slider(which, told, () => {
    const row = all[which.value], moduli = row.filter((_, i) => i % 2 === 0).map((re, i) => Math.hypot(re, row[2 * i + 1]));
    return `${labels[which.value]}: ${moduli.length} eigenvalue${moduli.length === 1 ? "" : "s"}, moduli ${plain(moduli[0])} to ${plain(moduli[moduli.length - 1])}, ` +
      `${moduli.filter(m => m > 1).length} above 1`;
  });
  const all_ = () => {
    const plane = axes(svg, {x: [-reach, reach], y: [-reach, reach], square: true, xLabel: "Re λ", yLabel: "Im λ"});
    plane.layer.append(draw("circle", {class: "circle", cx: plane.X(0), cy: plane.Y(0), r: plane.X(1) - plane.X(0)}));
    dots = [];
    const row = all[which.value];
    for (let i = 0; i < row.length; i += 2) {
      const [re, im] = [row[i], row[i + 1]], modulus = Math.hypot(re, im);
      if (!Number.isFinite(modulus)) continue;
      mark(plane, 0, re, im, {class: "series-2 dot"});
      dots.push({x: plane.X(re), y: plane.Y(im), text: `λ = ${complex(re, im)}\n|λ| = ${plain(modulus)}\n` +
        `time constant ${plain(-1 / Math.log(modulus))} steps` + (im ? `\nperiod ${plain(2 * Math.PI / Math.abs(Math.atan2(im, re)))} steps` : "")});
    }
    say();
  };
  which.addEventListener("input", all_);
  hover(svg, (x, y) => closest(dots, x, y)?.text);
  redraws.push(all_);
}

function map(part, {times, rows}) {
  const all = rows.map(numbers), svg = part.querySelector("svg"), last = times.length - 1;
  const early = control(part, "From s", last, 0), late = control(part, "to t", last, last), told = output(part);
  const reach = all.reduce((m, row, i) => row.slice(0, i + 1).reduce((n, v) => Number.isFinite(v) ? Math.max(n, Math.abs(v)) : n, m), 1e-3);
  const text = (s, t) => `s = ${times[s]}, t = ${times[t]}: ‖dh_t/dh_s‖ = ${s > t ? "0, for s is later" : power(all[t][s])}`;
  const say = slider(early, told, () => {
    const words = text(Number(early.value), Number(late.value));
    late.setAttribute("aria-valuetext", `t = ${times[late.value]}`);
    return words;
  });
  let on = null, cell = null;
  const move = () => {
    const [s, t] = [Number(early.value), Number(late.value)];
    cell.setAttribute("x", on.X(s));
    cell.setAttribute("y", on.Y(t + 1));
    say();
  };
  const redraw = () => {
    on = axes(svg, {x: [0, last + 1], y: [0, last + 1], square: true, xLabel: "", yLabel: ""});
    on.svg.querySelector(".grid").replaceChildren();
    const wide = on.X(1) - on.X(0);
    all.forEach((row, t) => row.forEach((v, s) => {
      if (s > t || Number.isNaN(v)) return;
      const strength = v === -Infinity ? 1 : Math.min(1, Math.abs(v) / reach);
      on.layer.append(draw("rect", {class: v > 0 ? "grown" : "shrunk", x: on.X(s), y: on.Y(t + 1), width: wide,
        height: wide, "fill-opacity": strength.toFixed(3)}));
    }));
    const label = (x, y, anchor, words) => on.layer.append(draw("text", {x, y, "text-anchor": anchor}, words));
    for (const k of ticks(0, last, 5, true)) {
      label(on.X(k + 0.5), on.bottom + 16, "middle", `${times[k]}`);
      label(on.left - 6, on.Y(k + 0.5) + 4, "end", `${times[k]}`);
    }
    label((on.left + on.right) / 2, on.bottom + 36, "middle", "s, of the state that has the influence");
    on.layer.append(draw("text", {transform: `translate(14 ${(on.top + on.bottom) / 2}) rotate(-90)`, "text-anchor": "middle"},
      "t, of the state that feels it"));
    cell = draw("rect", {class: "cell", width: wide, height: wide});
    on.layer.append(cell);
    move();
  };
  const place = (x, y) => {
    const s = Math.floor((x - on.left) / (on.X(1) - on.X(0))), t = Math.floor((on.bottom - y) / (on.Y(0) - on.Y(1)));
    return s >= 0 && t >= 0 && s <= last && t <= last ? [s, t] : null;
  };
  hover(svg, (x, y) => place(x, y) && text(...place(x, y)), (x, y) => {
    if (place(x, y)) [early.value, late.value] = place(x, y);
    move();
  });
  for (const input of [early, late]) input.addEventListener("input", move);
  redraws.push(redraw);
}

function series(part, {at, of, labels, unit, rows}) {
  const all = rows.map(numbers), svg = part.querySelector("svg");
  const time = control(part, "Time step", of, of), told = output(part);
  const value = (row, t) => row[nearest(at, t)];
  const say = slider(time, told, () => `t = ${time.value} of ${of}: ` +
    all.slice(0, 8).map((row, i) => `${labels[i]} ${plain(value(row, Number(time.value)))}`).join("; ") + `, ${unit}`);
  let on = null, cursor = null;
  const move = () => {
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, on.X(Number(time.value)));
    say();
  };
  const redraw = () => {
    // What is measured in the first tenth is of few steps, and does not set the scale.
    const settled = all.flatMap(row => row.filter((_, i) => at[i] > of / 10));
    on = axes(svg, {x: [0, of], y: extent([...settled, 0], 1e-6), xLabel: "time step t", yLabel: unit});
    const clip = v => v < on.y[0] || v > on.y[1] ? NaN : v;
    all.forEach((row, i) => path(on, at, row.map(clip), {class: `series-${i % MARKS} line single`}));
    cursor = draw("line", {class: "cursor", y1: on.top, y2: on.bottom});
    on.layer.append(cursor);
    move();
  };
  time.addEventListener("input", move);
  const set = x => { time.value = Math.round(on.time(x)); move(); };
  hover(svg, x => {
    const t = Math.round(on.time(x));
    return t < 1 || t > of ? "" : [`t = ${t}`, ...all.slice(0, 8).map((row, i) => `${labels[i]}: ${plain(value(row, t))}`)].join("\n");
  }, set);
  redraws.push(redraw);
}

document.documentElement.classList.add("scripted");
for (const element of document.querySelectorAll(".live")) element.hidden = false;
if (data.flows.length) flows();
for (const part of document.querySelectorAll(".part")) ({modes, map, series})[part.dataset.kind](part, data.parts[part.dataset.key]);
const redraw = () => redraws.forEach(f => f());
let width = 0;
new ResizeObserver(() => {
  if (document.body.clientWidth !== width) { width = document.body.clientWidth; redraw(); }
}).observe(document.body);
redraw();
})();
