// Charts with a cross-hair, sortable tables, the order of the pictures, and the refresh while a run is under way.

const AXES = { steps: "updates", images: "images sampled for training", seconds: "time of the updates", weight: "LoRA weight" };
const WIDTH = 460, HEIGHT = 250, LEFT = 54, RIGHT = 12, TOP = 12, BOTTOM = 36;
const known = (value) => typeof value === "number" && isFinite(value);
const colour = (curve) => `var(--c${curve.colour % 8})`;
let axis = recall("sessionStorage", "rewardtune-axis") || "steps";
const redraws = [];

function digits(value) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  const text = size >= 1000 ? String(Math.round(value)) : size !== 0 && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  return text.replaceAll("-", "−");
}

function clock(seconds) {
  if (seconds < 60) return `${Number(seconds.toPrecision(3))} s`;
  const minutes = Math.floor(Math.round(seconds) / 60), rest = Math.round(seconds) % 60;
  return minutes < 60 ? `${minutes} min ${String(rest).padStart(2, "0")} s` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

const shownX = (value, on) => (on === "seconds" ? clock(value) : digits(value));

function ticks(low, high, most, on) {
  const raw = (high - low) / most;
  let step;
  if (on === "seconds" && raw > 20) {
    step = [30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400].find((each) => each >= raw) || Math.ceil(raw / 86400) * 86400;
  } else {
    const power = 10 ** Math.floor(Math.log10(raw));
    step = [1, 2, 5, 10].find((each) => each * power >= raw) * power;
    if (on === "steps" || on === "images") step = Math.max(1, step);
  }
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

function shortX(value, on) {
  if (on !== "seconds") return value >= 10000 ? `${Number((value / 1000).toPrecision(3))}k` : digits(value);
  return value < 120 ? `${digits(value)} s` : value < 7200 ? `${digits(value / 60)} min` : `${digits(value / 3600)} h`;
}

// The chart of curves; each point is {x, y, low, high}.
function points(curve, on) {
  const xs = curve.x[on] || [];
  return xs.map((x, i) => ({ x, y: curve.y[i], low: curve.low ? curve.low[i] : null, high: curve.high ? curve.high[i] : null, label: curve.labels ? curve.labels[i] : null })).filter((p) => known(p.x));
}

function drawChart(spec, figure) {
  const plot = figure.querySelector(".plot");
  const hidden = new Set();
  const series = spec.bars || spec.curves;
  const tip = make("div", { class: "tip", hidden: true });
  const live = make("span", { class: "hidden", "aria-live": "polite" });
  const state = { at: null };

  const dashed = (curve) => curve.style === "mean" && series.some((each) => each.style === "eval");

  function swatchOf(curve) {
    const swatch = make("span", { class: `swatch ${curve.style || ""}${dashed(curve) ? " dashed" : ""}` });
    swatch.style.color = colour(curve);
    return swatch;
  }

  function frame() {
    const on = spec.bars ? "sampling step" : spec.axis || axis;
    const shown = series.filter((_, i) => !hidden.has(i));
    const sets = spec.bars ? null : shown.map((curve) => points(curve, on));
    const ys = [], xs = [];
    if (spec.bars) {
      shown.forEach((bar) => bar.y.forEach((y, i) => [y, bar.high && bar.high[i]].forEach((v) => known(v) && ys.push(v))));
      ys.push(0);
      xs.push(-0.5, Math.max(...series.map((bar) => bar.y.length)) - 0.5);
    } else {
      sets.forEach((set) => set.forEach((p) => { xs.push(p.x); [p.y, p.low, p.high].forEach((v) => known(v) && ys.push(v)); }));
      if (!spec.axis && xs.length) xs.push(0);
      // A bound far away would press the curves flat: its line is drawn where it is near.
      const span = Math.max(...ys) - Math.min(...ys) || Math.abs(ys[0]) || 1;
      (spec.lines || []).forEach((line) => { if (line.y > Math.min(...ys) - 1.5 * span && line.y < Math.max(...ys) + 1.5 * span) ys.push(line.y); });
    }
    const log = spec.log && ys.length > 0 && ys.every((y) => y > 0);
    const to = log ? Math.log10 : (y) => y;
    let [x0, x1] = xs.length ? [Math.min(...xs), Math.max(...xs)] : [0, 1];
    if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
    let [y0, y1] = ys.length ? [Math.min(...ys.map(to)), Math.max(...ys.map(to))] : [0, 1];
    const room = (y1 - y0 || Math.abs(y1) || 1) * 0.07;
    [y0, y1] = spec.range || [spec.bars ? 0 : y0 - room, y1 + room];
    const X = (x) => LEFT + ((x - x0) / (x1 - x0)) * (WIDTH - LEFT - RIGHT);
    const Y = (y) => HEIGHT - BOTTOM - ((to(y) - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
    return { on, shown, sets, log, x0, x1, y0, y1, X, Y };
  }

  function axesOf(f, svg) {
    const marks = f.log ? logTicks(f.y0, f.y1) : ticks(f.y0, f.y1, 5);
    for (const y of marks) {
      svg.append(make("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: f.Y(y), y2: f.Y(y) }));
      svg.append(make("text", { x: LEFT - 6, y: f.Y(y) + 4, "text-anchor": "end" }, digits(y)));
    }
    const wide = spec.bars ? ticks(0, Math.max(f.x1 - 0.5, 1), 10, "steps") : ticks(f.x0, f.x1, 6, f.on);
    for (const x of wide) {
      svg.append(make("line", { class: "axis", x1: f.X(x), x2: f.X(x), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4 }));
      svg.append(make("text", { x: f.X(x), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, spec.bars ? digits(x) : shortX(x, f.on)));
    }
    svg.append(make("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }));
    svg.append(make("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, spec.bars ? "sampling step, 0 is the noisiest" : spec.along || AXES[f.on]));
    (spec.lines || []).filter((line) => within(f, line.y)).forEach((line) => svg.append(make("line", { class: "bound", x1: LEFT, x2: WIDTH - RIGHT, y1: f.Y(line.y), y2: f.Y(line.y) })));
    if (spec.mark) svg.append(make("line", { class: "mark", x1: f.X(spec.mark.x), x2: f.X(spec.mark.x), y1: TOP, y2: HEIGHT - BOTTOM }));
  }

  function within(f, y) { return f.Y(y) >= TOP - 1 && f.Y(y) <= HEIGHT - BOTTOM + 1; }

  function logTicks(low, high) {
    const found = [];
    for (let power = Math.floor(low); power <= high; power++) for (const each of high - low > 2 ? [1] : [1, 2, 5]) {
      const at = Math.log10(each) + power;
      if (at >= low && at <= high) found.push(each * 10 ** power);
    }
    return found;
  }

  function draw() {
    const f = frame();
    const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": spoken() });
    axesOf(f, svg);
    if (spec.bars) drawBars(f, svg); else f.shown.forEach((curve, i) => drawCurve(f, svg, curve, f.sets[i]));
    const cross = make("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    svg.append(cross);
    plot.replaceChildren(svg, tip, live);
    state.frame = f; state.cross = cross; state.svg = svg; state.at = null; tip.hidden = true;
    svg.addEventListener("pointermove", (event) => point(event));
    svg.addEventListener("pointerdown", (event) => point(event));
    svg.addEventListener("pointerleave", leave);
  }

  function drawCurve(f, svg, curve, set) {
    const stroke = colour(curve);
    const band = set.filter((p) => known(p.low) && known(p.high));
    if (band.length > 1) {
      const path = band.map((p, i) => `${i ? "L" : "M"}${f.X(p.x)},${f.Y(p.high)}`).join("") + band.slice().reverse().map((p) => `L${f.X(p.x)},${f.Y(p.low)}`).join("") + "Z";
      svg.append(make("path", { d: path, fill: stroke, "fill-opacity": 0.16 }));
    }
    let path = "", open = false;
    for (const p of set) {
      if (!known(p.y) || (f.log && p.y <= 0)) { open = false; continue; }
      path += `${open ? "L" : "M"}${f.X(p.x).toFixed(1)},${f.Y(p.y).toFixed(1)}`;
      open = true;
    }
    const raw = curve.style === "raw";
    svg.append(make("path", { d: path, fill: "none", stroke, "stroke-width": raw ? 1.2 : 2, "stroke-opacity": raw ? 0.45 : 1, "stroke-dasharray": dashed(curve) ? "5 3" : null }));
    const dots = curve.style === "eval" ? set.length <= 60 : set.length <= 12;
    if (dots) for (const p of set) if (known(p.y)) svg.append(make("circle", { cx: f.X(p.x), cy: f.Y(p.y), r: curve.style === "eval" ? 3.6 : 2.2, fill: stroke, "fill-opacity": raw ? 0.6 : 1 }));
    for (const p of set) if (p.label && known(p.y)) svg.append(make("text", { x: f.X(p.x) + (f.X(p.x) > WIDTH - 40 ? -6 : 6), y: f.Y(p.y) - 6, "text-anchor": f.X(p.x) > WIDTH - 40 ? "end" : "start" }, p.label));
  }

  function drawBars(f, svg) {
    const room = (f.X(1) - f.X(0)) * 0.8, width = Math.max(1, room / f.shown.length);
    f.shown.forEach((bar, n) => bar.y.forEach((y, i) => {
      if (!known(y)) return;
      const x = f.X(i) - room / 2 + n * width;
      svg.append(make("rect", { x, width: Math.max(1, width - 1), y: f.Y(y), height: Math.max(0, f.Y(0) - f.Y(y)), fill: colour(bar), "fill-opacity": 0.75 }));
      if (bar.low && known(bar.low[i])) svg.append(make("line", { x1: x + width / 2, x2: x + width / 2, y1: f.Y(bar.low[i]), y2: f.Y(bar.high[i]), stroke: "var(--ink)", "stroke-width": 1.5 }));
    }));
  }

  // The places that the cross-hair can stand at.
  function stops() {
    const f = state.frame;
    if (spec.bars) return [...Array(Math.max(...series.map((bar) => bar.y.length))).keys()];
    return [...new Set(f.sets.flat().map((p) => p.x))].sort((a, b) => a - b);
  }

  function rows(at) {
    const f = state.frame;
    if (spec.bars) return f.shown.filter((bar) => known(bar.y[at])).map((bar) => ({ curve: bar, text: digits(bar.y[at]) + (bar.low && known(bar.low[at]) ? ` (${digits(bar.low[at])} to ${digits(bar.high[at])}), ${bar.count[at]} updates` : "") }));
    const found = [];
    f.shown.forEach((curve, i) => {
      const set = f.sets[i].filter((p) => known(p.y));
      if (!set.length) return;
      const near = set.reduce((best, p) => (Math.abs(p.x - at) < Math.abs(best.x - at) ? p : best));
      if (Math.abs(near.x - at) > (f.x1 - f.x0) / 40) return;
      const ends = known(near.low) && known(near.high) ? ` (${digits(near.low)} to ${digits(near.high)})` : "";
      const text = near.label ? set.filter((p) => p.x === near.x).map((p) => `${digits(p.y)} at weight ${p.label}`).join(", ") : digits(near.y) + ends;
      found.push({ curve, text });
    });
    return found;
  }

  function show(at, speak, below) {
    const f = state.frame;
    state.at = at;
    const head = spec.bars ? `sampling step ${at}` : f.on === "steps" ? `step ${at}` : f.on === "weight" ? `weight ${digits(at)}` : f.on === "along" ? `${spec.along} ${digits(at)}` : f.on === "images" ? `${digits(at)} images` : clock(at);
    const lines = rows(at).map(({ curve, text }) => {
      return make("div", {}, swatchOf(curve), ` ${curve.name}: ${text}`);
    });
    if (spec.bars && !lines.length) lines.push(make("div", {}, "never trained"));
    tip.replaceChildren(make("b", {}, head), ...lines);
    tip.hidden = false;
    state.cross.setAttribute("visibility", "visible");
    for (const end of ["x1", "x2"]) state.cross.setAttribute(end, f.X(at));
    const box = plot.getBoundingClientRect(), x = (f.X(at) / WIDTH) * box.width;
    tip.style.left = `${Math.max(0, Math.min(x + 10, box.width - tip.offsetWidth))}px`;
    if (x + 10 + tip.offsetWidth > box.width) tip.style.left = `${Math.max(0, x - 10 - tip.offsetWidth)}px`;
    tip.style.top = below ? `${box.height * 0.5}px` : "8px";  // away from the pointer
    if (speak) live.textContent = [head, ...rows(at).map(({ curve, text }) => `${curve.name}: ${text}`)].join(", ");
  }

  function leave() {
    state.at = null;
    tip.hidden = true;
    state.cross.setAttribute("visibility", "hidden");
  }

  function point(event) {
    const box = state.svg.getBoundingClientRect(), f = state.frame;
    const x = f.x0 + ((((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT)) * (f.x1 - f.x0);
    const all = stops();
    if (all.length) show(all.reduce((best, each) => (Math.abs(each - x) < Math.abs(best - x) ? each : best)), false, event.clientY < box.top + box.height * 0.45);
  }

  plot.addEventListener("keydown", (event) => {
    const all = stops(), now = all.indexOf(state.at);
    const next = { ArrowRight: now + 1, ArrowLeft: now < 0 ? all.length - 1 : now - 1, Home: 0, End: all.length - 1 }[event.key];
    if (event.key === "Escape") return leave();
    if (next === undefined || !all.length) return;
    event.preventDefault();
    show(all[Math.max(0, Math.min(all.length - 1, next))], true);
  });
  plot.addEventListener("blur", leave);

  function spoken() {
    const each = series.map((one) => {
      const set = one.y.filter(known);
      return set.length ? `${one.name}: ${digits(set[0])} first, ${digits(set[set.length - 1])} last, ${digits(Math.min(...set))} to ${digits(Math.max(...set))}` : "";
    });
    return [spec.title, spec.note, ...each, ...(spec.lines || []).map((line) => line.name), "arrow keys read the values"].filter(Boolean).join("; ");
  }

  const key = figure.querySelector(".key");
  series.forEach((one, i) => {
    key.append(make("button", { type: "button", "aria-pressed": "true", title: "show or hide", on: { click: (event) => {
      hidden.has(i) ? hidden.delete(i) : hidden.add(i);
      event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(i)));
      draw();
    } } }, swatchOf(one), one.name));
  });
  for (const line of [...(spec.lines || []), ...(spec.mark ? [spec.mark] : [])]) {
    const swatch = make("span", { class: "swatch dashed" });
    swatch.style.color = spec.mark === line ? "var(--good)" : "var(--bad)";
    key.append(make("span", { class: "note" }, swatch, ` ${line.name}`));
  }

  const numbers = figure.querySelector(".numbers");
  numbers.addEventListener("toggle", () => numbers.open && fill());
  function fill() {
    const on = spec.axis || "steps", along = on === "along";  // its rows are the weights: two may be equal in x
    const heads = [spec.bars ? "sampling step" : along ? AXES.weight : AXES[on], ...series.map((one) => one.name)];
    const lines = new Map();
    const put = (x, i, text) => { if (!lines.has(x)) lines.set(x, series.map(() => "")); lines.get(x)[i] = text; };
    series.forEach((one, i) => {
      if (spec.bars) one.y.forEach((y, x) => put(x, i, digits(y)));
      else if (along) points(one, on).forEach((p) => put(Number(p.label), i, `${digits(p.y)} at ${spec.along} ${digits(p.x)}`));
      else points(one, on).forEach((p) => put(p.x, i, digits(p.y) + (known(p.low) && known(p.high) ? ` (${digits(p.low)} to ${digits(p.high)})` : "")));
    });
    const body = [...lines.entries()].sort((a, b) => a[0] - b[0]).map(([x, cells]) => make("tr", {}, make("th", { scope: "row" }, digits(x)), ...cells.map((cell) => make("td", {}, cell))));
    const table = make("table", {}, make("caption", { class: "hidden" }, spec.title), make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))), make("tbody", {}, ...body));
    numbers.querySelector(".scroll").replaceChildren(table);
  }
  draw();
  if (!spec.bars && !spec.axis) redraws.push(draw);
}

for (const spec of pageData.charts) {
  const figure = document.getElementById(spec.id);
  if (figure) drawChart(spec, figure);
}

for (const radio of document.querySelectorAll("input[name=axis]")) {
  radio.checked = radio.value === axis;
  radio.addEventListener("change", () => {
    axis = radio.value;
    remember("sessionStorage", "rewardtune-axis", axis);
    redraws.forEach((draw) => draw());
  });
}

// A picture that is shown twice is in the page once.
for (const image of document.querySelectorAll("img[data-copy]")) image.src = document.getElementById(image.dataset.copy).src;

// Sortable tables: a button in each heading; empty cells stay below.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = make("button", { type: "button", on: { click: () => {
      const up = head.getAttribute("aria-sort") === "descending" || !head.hasAttribute("aria-sort") && !body.rows[0].cells[column].dataset.sort;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map((row, i) => ({ row, i, cell: row.cells[column] }));
      const number = rows.some(({ cell }) => cell.dataset.sort);
      const empty = (cell) => number && !cell.dataset.sort;
      rows.sort((a, b) => {
        if (empty(a.cell) !== empty(b.cell)) return empty(a.cell) ? 1 : -1;
        const apart = number ? Number(a.cell.dataset.sort) - Number(b.cell.dataset.sort) : a.cell.textContent.trim().localeCompare(b.cell.textContent.trim(), undefined, { numeric: true });
        return (up ? apart : -apart) || a.i - b.i;
      });
      body.append(...rows.map(({ row }) => row));
    } } }, head.textContent.trim());
    head.replaceChildren(button);
  });
}

// Tables wider than the page say so.
for (const box of document.querySelectorAll(".scroll")) {
  new ResizeObserver(() => box.classList.toggle("more", box.scrollWidth > box.clientWidth + 1)).observe(box);
}

// The order of the before/after pairs.
for (const select of document.querySelectorAll("select.order")) {
  select.addEventListener("change", () => {
    const list = document.getElementById(select.dataset.list);
    const rank = (card) => { const found = card.dataset[select.value]; return found === undefined ? Infinity : Number(found); };
    list.append(...[...list.children].sort((a, b) => rank(a) - rank(b) || Number(a.dataset.index) - Number(b.dataset.index)));
  });
}

// While a run is under way: read the page again, where the reader was, with the same sections open.
(function refresh() {
  const name = "rewardtune-place " + location.pathname;
  const folds = [...document.querySelectorAll("details[id]")];
  const saved = JSON.parse(recall("sessionStorage", name) || "null");
  if (saved) {
    const pausing = document.getElementById("pausing");
    if (pausing) pausing.hidden = false;  // before scrolling: it takes a line
    folds.forEach((fold) => { if (fold.id in saved.open) fold.open = saved.open[fold.id]; });
    if (!location.hash || saved.again) window.scrollTo({ top: saved.y, behavior: "instant" });
    try { window.sessionStorage.removeItem(name); } catch (error) { /* forbidden */ }
  }
  if (!pageData.refresh) return;
  const box = document.getElementById("pause");
  box.checked = saved ? saved.paused : false;
  document.getElementById("pausing").hidden = false;
  const hold = () => remember("sessionStorage", name, JSON.stringify({ y: window.scrollY, open: Object.fromEntries(folds.map((fold) => [fold.id, fold.open])), paused: box.checked, again: true }));
  window.setInterval(() => {
    const busy = document.activeElement && document.activeElement.matches(".plot, select");
    if (box.checked || document.hidden || busy) return;
    hold();
    location.reload();
  }, pageData.refresh * 1000);
})();
