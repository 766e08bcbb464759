// The page: its state stands in the address, what it shows comes from api/, and text of the data is only ever text.
import {ask, depthColor, Picture, readImage, readMap, Refused} from "./draw.js";

const COUNT = 48, CARD_SIDE = 320, PANEL_SIDE = 2048, CLOSEST = 32, GAP = 12, CAPTIONS = 66;
const FILTERS = ["model", "class", "status", "score_min", "score_max", "conf_min", "conf_max", "text", "shard", "sort"];
const ROW = ["of", "version", "in", "at"];  // whose row is open: model, version, shard, position
const SORTS = {
  order: "as stored", confidence: "confidence, lowest first", "-confidence": "confidence, highest first",
  entropy: "entropy, lowest first", "-entropy": "entropy, highest first",
  low_confidence: "unsure pixels, fewest first", "-low_confidence": "unsure pixels, most first",
  objects: "objects, fewest first", "-objects": "objects, most first",
};
const RISING = new Set(["semantic.mIoU", "semantic.pixel_accuracy", "panoptic.PQ", "detection.bbox.F1",
  "detection.segm.F1", "depth.delta1"]);

const element = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");

function make(tag, properties = {}, ...children) {
  const {data, ...rest} = properties;
  const made = Object.assign(document.createElement(tag), rest);
  Object.assign(made.dataset, data || {});
  made.append(...children);
  return made;
}

// State.

let table = null;
let state = {};
let page = {rows: [], next: null, first: 0};
let trail = [];  // where the pages before this one begin
let asking = null;
let masks = true;
const look = {opacity: 55, outlines: true};
const cards = new Map();

function readAddress() {
  state = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (!("model" in state) && table.models.length) state.model = table.models[0].label;
  if (state.opacity) look.opacity = Math.min(100, Math.max(0, Number(state.opacity) || 0));
  if (state.outlines) look.outlines = state.outlines !== "off";
}

function address(changes = {}) {
  const words = new URLSearchParams();
  const whole = {...state, ...changes};
  for (const name of [...FILTERS, "start", ...ROW, "opacity", "outlines", "off"]) {
    if (whole[name] || (name === "model" && whole[name] !== undefined)) words.set(name, whole[name]);
  }
  return `#${words}`;
}

function go(changes, {replace = false} = {}) {
  const before = filtersOf(state);
  state = {...state, ...changes};
  history[replace ? "replaceState" : "pushState"](null, "", address());
  show(filtersOf(state) !== before);
}

const filtersOf = (words) => JSON.stringify([...FILTERS, "start"].map((name) => words[name] || ""));
const noRow = Object.fromEntries(ROW.map((name) => [name, ""]));

function show(isOther) {
  fillForm();
  if (isOther) load();
  showDetail();
}

// The rows of a page.

async function load() {
  asking?.abort();
  const controller = asking = new AbortController();
  page = {rows: [], next: state.start || "", first: 0, searched: 0, total: 0};
  cards.clear();
  element("grid").replaceChildren();
  element("nothing").hidden = true;
  await search(controller);
}

// One answer may end before its page is full: the search goes on from there until it is, or until Stop.
async function search(controller) {
  element("halt").hidden = true;
  const slow = setTimeout(() => { element("halt").hidden = controller.signal.aborted; }, 1200);
  element("halt").textContent = "Stop";
  element("halt").onclick = () => {
    controller.abort();
    const again = asking = new AbortController();
    element("halt").textContent = "Search on";
    element("halt").hidden = false;
    element("halt").onclick = () => search(again);
    tell(true);
  };
  try {
    while (page.next !== null && page.rows.length < COUNT) {
      const words = new URLSearchParams({count: COUNT - page.rows.length, start: page.next || ""});
      for (const name of FILTERS) if (state[name]) words.set(name, state[name]);
      const answer = await (await ask(`api/rows?${words}`, controller.signal)).json();
      const {rows, ...rest} = answer;
      Object.assign(page, rest, {rows: [...page.rows, ...rows], ranking: Boolean(answer.ranking)});
      rows.forEach(addCard);
      tell(true);
    }
    element("halt").hidden = true;
  } catch (error) {
    if (controller.signal.aborted) return;
    element("halt").hidden = true;
    fail(error);
    return;
  } finally {
    clearTimeout(slow);
  }
  tell(false);
  fillForm();
  showDetail();
}

function tell(isSearching) {
  const {rows, searched, total, next, listed, unranked, first, cut} = page;
  const words = [];
  if (isSearching && page.ranking) words.push(`sorting: ${number.format(searched)} of ${number.format(total)} rows`);
  else if (isSearching) words.push(`searched ${number.format(searched)} of ${number.format(total)} rows`);
  else if (listed !== undefined) {
    words.push(rows.length ? `${number.format(first + 1)}–${number.format(first + rows.length)} of ${number.format(listed)}` : "no rows");
    if (cut) words.push("more are not sorted");
    if (unranked) words.push(`${number.format(unranked)} without this value`);
  } else words.push(`${rows.length} of ${number.format(total)} rows`);
  element("progress").textContent = words.join(", ");
  element("nothing").hidden = isSearching || rows.length > 0;
  element("nothing").textContent = state.start ? "No more rows." : "No row fits these filters.";
  element("next").disabled = isSearching || next === null;
  element("previous").disabled = !state.start;
}

function fail(error) {
  element("progress").textContent = "";
  element("nothing").hidden = false;
  element("nothing").textContent = error instanceof Refused ? error.message : "The server does not answer. Is `maskmill view` still running?";
}

function turn(forth) {
  if (forth && page.next !== null && !element("next").disabled) {
    trail.push(state.start || "");
    go({...noRow, start: page.next});
  } else if (!forth && state.start) {
    const back = trail.length ? trail.pop() : page.listed === undefined ? "" : String(Math.max(0, page.first - COUNT));
    go({...noRow, start: back === "0" ? "" : back});
  }
  scrollTo(0, 0);
}

// Cards.

const keyOf = (row) => JSON.stringify([row.model, row.version, row.shard, row.position]);
const wordsOf = (row, size) => new URLSearchParams({model: row.model, version: row.version, shard: row.shard, position: row.position, size});
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

function classOf(row, id) {
  const model = table.models.find(({label}) => label === row.model);
  return model?.classes.find((entry) => entry.id === id)?.name || `class ${id}`;
}

function factsOf(row) {
  const facts = [];
  const sort = (state.sort || "").replace(/^-/, "");
  if (row.value !== undefined && !["confidence", "objects"].includes(sort)) facts.push(`${sort} ${row.value.toFixed(3)}`);
  if (row.confidence !== null) facts.push(`confidence ${row.confidence.toFixed(3)}`);
  if (row.objects !== null) {
    facts.push(`${row.objects} object${row.objects === 1 ? "" : "s"}`);
    facts.push(...row.classes.slice(0, 3).map(([id, count]) => `${classOf(row, id)}${count > 1 ? ` ×${count}` : ""}`));
  }
  return facts.join(" · ");
}

const visible = new IntersectionObserver((entries) => {
  for (const {isIntersecting, target} of entries) {
    if (isIntersecting) {
      visible.unobserve(target);
      cards.get(target.dataset.key)?.load();
    }
  }
}, {rootMargin: "300px"});

function addCard(row) {
  const canvas = make("canvas", {width: 4, height: 3});
  const frame = make("span", {className: "frame"});
  const id = make("bdi", {textContent: row.image});
  const card = make("button", {type: "button", className: "card", title: row.image, data: {key: keyOf(row)}},
    frame, make("span", {className: "name"}, id), make("span", {className: "facts", textContent: factsOf(row)}));
  card.setAttribute("role", "listitem");
  card.onclick = () => open(row);
  const picture = new Picture(canvas);
  const signal = asking.signal;
  const shown = {
    row, card, picture,
    draw: () => row.status === "ok" && picture.draw(row, masks ? look.opacity / 100 : 0, look.outlines),
    async load() {
      if (row.status !== "ok") return;
      const [image, map] = await Promise.allSettled([
        readImage(`api/image?${wordsOf(row, CARD_SIDE)}`, signal),
        row.kind ? readMap(`api/map?${wordsOf(row, CARD_SIDE)}`, signal) : null,
      ]);
      if (signal.aborted) return;
      picture.set(image.value || null, map.value || null);
      shown.draw();
      const said = [image, map].filter(({reason}) => reason).map(({reason}) => reason.message);
      if (said.length) frame.append(make("span", {className: "tag", textContent: said[0], title: said.join("; ")}));
    },
  };
  if (row.status === "ok") frame.append(canvas);
  else frame.append(make("span", {className: "broken"}, make("b", {textContent: row.error[0] || row.status}), row.error[2]));
  cards.set(card.dataset.key, shown);
  element("grid").append(card);
  visible.observe(card);
}

function redraw() {
  for (const {draw} of cards.values()) draw();
  for (const {draw} of panels) draw();
}

// One image, large: the image, each model's row, the target.

let panels = [];
let opened = "";
let filling = null;
let zoom = {scale: 1, x: 0, y: 0};
let hidden = new Set();

function open(row) {
  go({of: row.model, version: row.version, in: row.shard, at: String(row.position)}, {replace: element("detail").open});
}

function showDetail() {
  const isOpen = Boolean(state.of && state.at);
  const wanted = isOpen ? JSON.stringify(ROW.map((name) => state[name])) : "";
  if (!isOpen && element("detail").open) element("detail").close();
  if (isOpen && !element("detail").open) element("detail").showModal();
  const at = place();
  element("back").disabled = at <= 0;
  element("forth").disabled = at < 0 || (at === page.rows.length - 1 && page.next === null);
  if (wanted === opened) return;
  opened = wanted;
  filling?.abort();
  panels = [];
  if (isOpen) fillDetail(filling = new AbortController());
}

const place = () => page.rows.findIndex((row) => row.model === state.of && row.shard === state.in && String(row.position) === state.at && (!state.version || row.version === state.version));

async function fillDetail({signal}) {
  zoom = {scale: 1, x: 0, y: 0};
  hidden = new Set();
  const words = new URLSearchParams({model: state.of, version: state.version || "", shard: state.in, position: state.at});
  let rows;
  try {
    ({rows} = await (await ask(`api/row?${words}`, signal)).json());
  } catch (error) {
    if (signal.aborted) return;
    element("name").textContent = error instanceof Refused ? error.message : "The server does not answer.";
    for (const id of ["panels", "legend", "facts", "shown"]) element(id).replaceChildren();
    return;
  }
  if (signal.aborted) return;
  const [first] = rows;
  element("name").textContent = first.image;
  const image = readImage(`api/image?${wordsOf(first, PANEL_SIDE)}`, signal);
  image.catch(() => {});
  panels = [makePanel("image", first, image, null, {caption: "image"})];
  for (const row of rows) {
    const map = row.status === "ok" && row.kind ? readMap(`api/map?${wordsOf(row, PANEL_SIDE)}`, signal) : null;
    panels.push(makePanel(row.model, row, image, map, {caption: row.shownModel}));
  }
  const target = readMap(`api/target?${wordsOf(first, PANEL_SIDE)}`, signal);
  const panel = makePanel("target", first, image, target, {caption: "target", optional: true});
  panels.push(panel);
  element("panels").replaceChildren(...panels.map(({figure}) => figure));
  arrange();
  makeToggles();
  fillFacts(rows);
  await Promise.allSettled(panels.map(({filled}) => filled));
  if (signal.aborted) return;
  panels = panels.filter(({gone, figure}) => { if (gone) figure.remove(); return !gone; });
  arrange();
  makeToggles();
  fillLegend();
}

function makePanel(name, row, image, map, {caption, optional = false}) {
  const canvas = make("canvas", {width: row.width || 4, height: row.height || 3});
  const value = make("span", {className: "value"});
  const view = make("div", {className: "view"}, canvas);
  const said = make("p", {className: "said"});
  const figure = make("figure", {className: "panel", hidden: off().has(name)},
    make("figcaption", {}, make("b", {textContent: caption, title: caption}), value), view, said);
  const picture = new Picture(canvas);
  const panel = {name, caption, row, view, canvas, value, figure, picture, gone: false};
  panel.draw = () => {
    picture.draw(row, name === "image" || !masks ? 0 : look.opacity / 100, look.outlines);
    view.style.aspectRatio = `${canvas.width} / ${canvas.height}`;
  };
  panel.say = (text, isBad = false) => {
    if (text) said.append(...(said.childNodes.length ? [make("br")] : []), text);
    if (isBad) said.classList.add("bad");
  };
  panel.draw();
  if (name !== "image" && name !== "target") {
    panel.say([factsOf(row), ...Object.entries(row.figures || {}).map(([key, n]) => `${key} ${n.toFixed(3)}`)].filter(Boolean).join(" · "));
    if (row.status !== "ok") panel.say(`${row.error[0]} at ${row.error[1]}: ${row.error[2]}`, true);
  }
  panel.filled = Promise.allSettled([image, map]).then(([shown, drawn]) => {
    if (optional && drawn.reason) panel.gone = true;
    if (name === "image" && shown.reason) panel.say(`no image: ${shown.reason.message}`, true);
    if (!optional && drawn.reason) panel.say(`no masks: ${drawn.reason.message}`, true);
    const map = drawn.value || null, photo = shown.value || null;
    picture.set(photo, map);
    if (map?.note) panel.say(map.note);
    if (map && photo && (map.width !== photo.width || map.height !== photo.height)) {
      panel.say(`the source's image is now ${photo.width}×${photo.height}, the mask is of ${map.width}×${map.height}`, true);
    }
    if (map && Math.max(map.width, map.height) > PANEL_SIDE) panel.say(`drawn at ${map.columns}×${map.rows} of ${map.width}×${map.height} pixels`);
    panel.draw();
  });
  follow(panel);
  return panel;
}

const off = () => new Set((state.off || "").split("|").filter(Boolean).map(decodeURIComponent));

function makeToggles() {
  element("shown").replaceChildren(
    ...panels.map(({name, caption}, i) => {
      const box = make("input", {type: "checkbox", checked: !off().has(name)});
      box.onchange = () => toggle(i);
      return make("label", {}, box, `${i + 1} ${caption}`);
    }),
    make("span", {className: "gap"}),
    make("button", {type: "button", textContent: "−", title: "further (−)", onclick: () => zoomBy(0.5)}),
    make("button", {type: "button", textContent: "+", title: "closer (+)", onclick: () => zoomBy(2)}),
  );
}

function toggle(index) {
  const panel = panels[index];
  if (!panel) return;
  const names = off();
  if (!names.delete(panel.name)) names.add(panel.name);
  go({off: [...names].map(encodeURIComponent).join("|")}, {replace: true});
  for (const {name, figure} of panels) figure.hidden = names.has(name);
  arrange();
  makeToggles();
}

// As many beside each other as makes them largest on this screen.
function arrange() {
  const shown = panels.filter(({figure}) => !figure.hidden);
  if (!shown.length) return;
  const {clientWidth: width} = element("panels");
  const height = Math.max(240, innerHeight - 150);
  const ratio = Math.max(...shown.map(({canvas}) => canvas.width / canvas.height));
  const sizeOf = (across) => Math.min(width / across - GAP, (height / Math.ceil(shown.length / across) - CAPTIONS) * ratio);
  let best = 1;
  for (let across = 2; across <= shown.length; across++) if (sizeOf(across) > sizeOf(best)) best = across;
  // On a narrow screen one below the other, however high that is.
  const size = width < 700 ? width : Math.max(180, sizeOf(best));
  element("panels").style.gridTemplateColumns = `repeat(${width < 700 ? 1 : best}, ${size}px)`;
}
addEventListener("resize", arrange);

function fillLegend() {
  const classes = new Map();
  const ramps = [];
  for (const {name, caption, picture: {map}} of panels) {
    if (!map) continue;
    if (map.kind === "depth") ramps.push([caption, map]);
    for (const entry of map.entries || []) {
      const known = classes.get(entry.key) || {...entry, shares: new Map()};
      known.shares.set(name, (known.shares.get(name) || 0) + (entry.share || 0));
      classes.set(entry.key, known);
    }
  }
  const most = (entry) => Math.max(0, ...entry.shares.values());
  const chips = [...classes.values()].sort((a, b) => most(b) - most(a)).map((entry) => {
    const swatch = make("span", {className: "swatch"});
    swatch.style.background = `rgb(${entry.color.join(" ")})`;
    const chip = make("button", {type: "button", className: "chip", title: [...entry.shares].map(([of, share]) => `${of}: ${percent(share)}`).join("\n")},
      swatch, make("span", {textContent: entry.name}), make("span", {className: "faint", textContent: percent(most(entry))}));
    chip.setAttribute("aria-pressed", String(!hidden.has(entry.key)));
    chip.onclick = () => {
      if (!hidden.delete(entry.key)) hidden.add(entry.key);
      chip.setAttribute("aria-pressed", String(!hidden.has(entry.key)));
      light(null);
    };
    chip.onpointerenter = (event) => event.pointerType === "mouse" && !hidden.has(entry.key) && light(entry.key);
    chip.onpointerleave = () => light(null);
    return chip;
  });
  const scales = ramps.map(([caption, map]) => {
    const canvas = make("canvas", {className: "ramp", width: 150, height: 1});
    const context = canvas.getContext("2d");
    for (let x = 0; x < 150; x++) {
      context.fillStyle = `rgb(${depthColor(1 - x / 149).map(Math.round).join(" ")})`;
      context.fillRect(x, 0, 1, 1);
    }
    const unit = map.depth === "metric_m" ? " m" : "";
    return make("span", {className: "bar"}, caption, make("span", {textContent: map.near.toPrecision(3) + unit}), canvas,
      make("span", {textContent: `${map.far.toPrecision(3)}${unit}${map.depth === "metric_m" ? "" : ` (${map.depth})`}`}));
  });
  element("legend").replaceChildren(...scales, ...chips);
}

function light(id) {
  for (const panel of panels) {
    panel.picture.hide(hidden, id);
    panel.draw();
  }
}

function fillFacts(rows) {
  const [first] = rows;
  const lines = [
    ["shard", `${first.shownShard}, position ${first.position}`],
    ["size", first.width ? `${first.width} × ${first.height} pixels` : "unknown"],
    ...first.fields,
    ...rows.map((row) => [`row of ${row.shownModel}`, [row.version, row.status, row.labeled_at, row.run && `run ${row.run}`, row.entropy !== null && `entropy ${row.entropy.toFixed(3)}`, row.low_confidence !== null && `${percent(row.low_confidence)} of pixels unsure`, row.attempts > 1 && `${row.attempts} attempts`].filter(Boolean).join(" · ")]),
  ];
  element("facts").replaceChildren(make("table", {}, make("tbody", {},
    ...lines.map(([name, text]) => make("tr", {}, make("th", {textContent: name}), make("td", {textContent: text}))))));
}

// The pointer and the zoom are the same in all panels.

function follow(panel) {
  let dragged = null;
  const share = (event) => {
    const box = panel.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  panel.view.onpointermove = (event) => {
    if (dragged) {
      const box = panel.view.getBoundingClientRect();
      zoom.x += (event.clientX - dragged[0]) / box.width;
      zoom.y += (event.clientY - dragged[1]) / box.height;
      dragged = [event.clientX, event.clientY];
      applyZoom();
    }
    point(panel, ...share(event));
  };
  panel.view.onpointerleave = () => point(null);
  panel.view.onpointerdown = (event) => {
    if (zoom.scale > 1) {
      dragged = [event.clientX, event.clientY];
      panel.view.setPointerCapture(event.pointerId);
    }
    point(panel, ...share(event));
  };
  panel.view.onpointerup = panel.view.onpointercancel = () => { dragged = null; };
  panel.view.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = panel.view.getBoundingClientRect();
    zoomBy(event.deltaY < 0 ? 1.25 : 0.8, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  }, {passive: false});
}

function point(over, x, y) {
  for (const panel of panels) {
    panel.value.textContent = over ? panel.picture.at(x, y) : "";
    panel.cross?.remove();
    panel.cross = null;
    if (over && panel !== over) {
      panel.cross = make("span", {className: "cross"});
      panel.cross.style.left = `${100 * (x * zoom.scale + zoom.x)}%`;
      panel.cross.style.top = `${100 * (y * zoom.scale + zoom.y)}%`;
      panel.view.append(panel.cross);
    }
  }
}

function zoomBy(factor, x = 0.5, y = 0.5) {
  const scale = Math.min(CLOSEST, Math.max(1, zoom.scale * factor));
  zoom = {scale, x: x - (x - zoom.x) * scale / zoom.scale, y: y - (y - zoom.y) * scale / zoom.scale};
  applyZoom();
}

function applyZoom() {
  zoom.x = Math.min(0, Math.max(1 - zoom.scale, zoom.x));
  zoom.y = Math.min(0, Math.max(1 - zoom.scale, zoom.y));
  for (const {canvas, view} of panels) {
    canvas.style.transform = `translate(${100 * zoom.x}%, ${100 * zoom.y}%) scale(${zoom.scale})`;
    view.classList.toggle("close", zoom.scale > 2);
  }
}

async function step(by) {
  const at = place();
  const next = page.rows[at + by];
  if (next) open(next);
  else if (at >= 0 && by > 0 && page.next !== null) {
    trail.push(state.start || "");
    state = {...state, start: page.next};
    await load();
    if (page.rows.length) open(page.rows[0]);
  } else if (at < 0 && page.rows.length) open(page.rows[0]);
}

// The form.

function options(select, items) {
  select.replaceChildren(...items.map(([value, textContent]) => make("option", {value, textContent})));
}

function fillForm() {
  const form = element("filters");
  const models = table.models.flatMap(({label, shown, version, versions}) => [
    [label, shown],
    ...versions.filter((one) => one.version && version && one.version !== version).map((one) => [`${label}@${one.version}`, `${shown}, older: ${one.version}`]),
  ]);
  options(form.model, [["", models.length > 1 ? "all models" : "any"], ...models]);
  const classes = new Map();
  for (const {label, classes: own} of table.models) {
    if (state.model && state.model !== label && !state.model.startsWith(`${label}@`)) continue;
    for (const {id, name} of own) classes.set(id, classes.has(id) && classes.get(id) !== name ? `${classes.get(id)} / ${name}` : name);
  }
  options(form.class, [["", "any"], ...[...classes].map(([id, name]) => [String(id), `${name} (${id})`])]);
  options(form.status, [["", "any"], ["ok", "ok"], ["failed", "failed"]]);
  options(form.sort, table.sorts.map((name) => [name, SORTS[name] || sortName(name)]));
  for (const name of FILTERS) {
    const value = state[name] || (name === "sort" ? "order" : "");
    const field = form.elements[name];
    if (field.tagName === "SELECT" && ![...field.options].some((option) => option.value === value)) {
      field.append(make("option", {value, textContent: value}));
    }
    if (document.activeElement !== field) field.value = value;
  }
  const asked = FILTERS.filter((name) => state[name] && name !== "model" && !(name === "sort" && state.sort === "order")).length;
  element("asked").textContent = asked ? `(${asked} set)` : "";
  element("opacity").value = look.opacity;
  element("outlines").checked = look.outlines;
}

function sortName(name) {
  const figure = name.replace(/^-/, "");
  return `${figure}, ${RISING.has(figure) === !name.startsWith("-") ? "worst" : "best"} first`;
}

function fillHead() {
  element("title").textContent = table.uri;
  document.title = `${table.uri} – maskmill view`;
  const failed = table.models.flatMap(({versions}) => versions.map((one) => one.failed || 0)).reduce((a, b) => a + b, 0);
  element("run").textContent = [`${number.format(table.rows)} rows`, failed && `${number.format(failed)} failed`, `${table.models.length} model${table.models.length === 1 ? "" : "s"}`, table.run.run_id && `run ${table.run.run_id} ${table.run.state}`].filter(Boolean).join(" · ");
  element("warning").hidden = !table.source;
  element("warning").textContent = `The images cannot be shown, so masks stand on gray squares: ${table.source}`;
}

element("filters").onsubmit = (event) => event.preventDefault();
element("filters").onchange = () => {
  const form = element("filters");
  const changes = Object.fromEntries(FILTERS.map((name) => [name, form.elements[name].value.trim()]));
  if (changes.model !== (state.model || "")) changes.class = "";
  document.activeElement?.tagName === "SELECT" && document.activeElement.blur();
  trail = [];
  go({...changes, ...noRow, start: ""});
};
element("clear").onclick = () => {
  trail = [];
  document.activeElement?.blur();
  go({...Object.fromEntries(FILTERS.map((name) => [name, ""])), ...noRow, start: "", model: table.models[0]?.label || ""});
};
element("opacity").oninput = () => { setLook({opacity: Number(element("opacity").value)}); };
element("outlines").onchange = () => setLook({outlines: element("outlines").checked});
element("previous").onclick = () => turn(false);
element("next").onclick = () => turn(true);
element("help").onclick = () => element("keys").showModal();
element("back").onclick = () => step(-1);
element("forth").onclick = () => step(1);
element("close").onclick = () => go(noRow);
element("detail").oncancel = (event) => { event.preventDefault(); go(noRow); };
element("reload").onclick = async () => {
  try {
    table = await (await ask("api/table?fresh=1")).json();
    fillHead();
    trail = [];
    go({start: ""}, {replace: true});
    load();
  } catch (error) { fail(error); }
};

function setLook(changes) {
  masks = true;
  Object.assign(look, changes);
  state = {...state, opacity: String(look.opacity), outlines: look.outlines ? "on" : "off"};
  history.replaceState(null, "", address());
  element("opacity").value = look.opacity;
  element("outlines").checked = look.outlines;
  redraw();
}

// Keys.

function moveFocus(by) {
  const all = [...cards.values()].map(({card}) => card);
  const at = all.indexOf(document.activeElement);
  const target = all[at < 0 ? 0 : Math.min(all.length - 1, Math.max(0, at + by))];
  target?.focus();
}

const columnsOfGrid = () => getComputedStyle(element("grid")).gridTemplateColumns.split(" ").length;

document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && !["checkbox", "range"].includes(event.target.type);
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (element("keys").open) return;
  const isOpen = element("detail").open;
  if (event.target.type === "range" && event.key.startsWith("Arrow")) return;
  const actions = {
    ArrowRight: () => isOpen ? step(1) : moveFocus(1),
    ArrowLeft: () => isOpen ? step(-1) : moveFocus(-1),
    ArrowDown: isOpen ? null : () => moveFocus(columnsOfGrid()),
    ArrowUp: isOpen ? null : () => moveFocus(-columnsOfGrid()),
    " ": () => { masks = !masks; redraw(); },
    "[": () => setLook({opacity: Math.max(0, look.opacity - 10)}),
    "]": () => setLook({opacity: Math.min(100, look.opacity + 10)}),
    o: () => setLook({outlines: !look.outlines}),
    "+": isOpen && (() => zoomBy(1.5)), "=": isOpen && (() => zoomBy(1.5)), "-": isOpen && (() => zoomBy(1 / 1.5)),
    0: isOpen && (() => { zoom = {scale: 1, x: 0, y: 0}; applyZoom(); }),
    n: isOpen ? null : () => turn(true),
    p: isOpen ? null : () => turn(false),
    "/": isOpen ? null : () => { element("asking").open = true; element("filters").elements.text.focus(); },
    "?": () => element("keys").showModal(),
  };
  const action = /^[1-9]$/.test(event.key) ? isOpen && (() => toggle(Number(event.key) - 1)) : actions[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});
addEventListener("popstate", () => {
  const before = filtersOf(state);
  readAddress();
  show(filtersOf(state) !== before);
  redraw();
});

try {
  table = await (await ask("api/table")).json();
  fillHead();
  readAddress();
  element("asking").open = innerWidth > 640;
  fillForm();
  load();
  showDetail();
} catch (error) { fail(error); }
