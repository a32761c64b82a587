{
  const data = JSON.parse(document.getElementById("data").textContent);
  const types = {Uint8Array, Uint16Array, Int16Array, Int32Array, Uint32Array, Float32Array};
  const unpack = ({type, data}) => new types[type](Uint8Array.from(atob(data), c => c.charCodeAt(0)).buffer);
  const col = Object.fromEntries(Object.entries(data.columns).map(([name, packed]) => [name, unpack(packed)]));
  const shown = unpack(data.shown);
  const slot = new Map(Array.from(shown, (sample, i) => [sample, i]));
  const STEP = 48, EACH = 8, UNKNOWN = 255; // cards drawn at a time, cards of a class where every class is shown
  const by = id => document.getElementById(id);
  const make = (tag, css, text) => {
    const node = document.createElement(tag);
    if (css) node.className = css;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const name = c => data.classes[c] ?? String(c);
  const differs = i => col.predicted[i] >= 0 && col.predicted[i] !== col.label[i];
  const START = {label: "each", predicted: "", sort: "mean", wrong: false, always: false};
  const state = {...START};
  const oneLabel = () => state.label !== "" && state.label !== "each";

  function matches(i) {
    return (!oneLabel() || col.label[i] === +state.label)
      && (state.predicted === "" || col.predicted[i] === +state.predicted)
      && (!state.wrong || differs(i)) && (!state.always || col.keep[i] === 200);
  }

  function thumb(i, size) {
    const at = slot.get(i), {width, height, side} = data.thumb, per = side * side;
    const scale = size / Math.max(width, height), place = at % per;
    const node = make("div", "thumb t" + Math.floor(at / per));
    node.style.width = width * scale + "px";
    node.style.height = height * scale + "px";
    node.style.backgroundSize = side * width * scale + "px auto";
    node.style.backgroundPosition = -(place % side) * width * scale + "px " + -Math.floor(place / side) * height * scale + "px";
    return node;
  }

  // Percent, from how often: the column has steps of half a percent, and rounding those again makes 34 of a third.
  const kept = i => Math.round(100 * Math.round(col.keep[i] / 200 * col.seen[i]) / (col.seen[i] || 1));

  function card(i, size) {
    const node = make("article", "sample");
    if (slot.has(i) && data.thumb) node.append(thumb(i, size));
    if (slot.has(i) && data.rows) {
      const text = make("p");
      for (const [field, value] of data.rows[slot.get(i)]) {
        if (field) text.append(make("b", "", field + ": "));
        text.append(value, document.createElement("br"));
      }
      node.append(text);
    }
    if (data.classes.length > 1) node.append(make("div", "", name(col.label[i])));
    if (col.predicted[i] >= 0) {
      const said = make("div", "pair said" + (differs(i) ? " wrong" : ""));
      said.append(make("span", "", "→\u00a0" + name(col.predicted[i])));
      if (col.confidence[i] !== UNKNOWN) said.append(make("i", "", Math.round(col.confidence[i] / 2) + " %"));
      said.title = name(col.predicted[i]);
      node.append(said);
    }
    const rate = make("div", "pair"), track = make("span", "rate"), bar = make("b");
    bar.style.width = col.keep[i] / 2 + "%";
    track.append(bar);
    rate.append(track, make("i", "", kept(i) + " %"));
    rate.title = "kept " + kept(i) + " % of " + col.seen[i] + " times";
    node.append(rate, make("small", "", "#" + col.id[i] + " · loss " + col.mean[i].toPrecision(2)));
    node.dataset.id = col.id[i];
    return node;
  }

  let found = [], drawn = 0, matching = new Map();
  function more() {
    for (const end = Math.min(found.length, drawn + STEP); drawn < end; drawn++) {
      const i = found[drawn];
      const first = drawn === 0 || col.label[found[drawn - 1]] !== col.label[i];
      if (first && state.label === "each") by("cards").append(heading(col.label[i]));
      by("cards").append(card(i, data.thumb ? 96 : 0));
    }
    by("more").hidden = drawn >= found.length;
  }

  function heading(c) {
    const node = make("h3", "", name(c)), all = make("button", "", "all " + matching.get(c).length);
    all.addEventListener("click", () => { state.label = String(c); refresh(); });
    node.append(all);
    return node;
  }

  function refresh() {
    for (const id of ["label", "predicted", "sort"]) by(id).value = state[id];
    for (const id of ["wrong", "always"]) by(id).checked = state[id];
    const values = col[state.sort];
    found = Array.from(shown).filter(matches).sort((a, b) => values[b] - values[a] || col.mean[b] - col.mean[a]);
    const looked = found.length;
    if (state.label === "each") {
      matching = new Map(Array.from(new Set(found.map(i => col.label[i]))).sort((a, b) => a - b).map(c => [c, []]));
      for (const i of found) matching.get(col.label[i]).push(i);
      found = [...matching.values()].flatMap(group => group.slice(0, EACH));
    }
    drawn = 0;
    by("cards").replaceChildren();
    by("cards").className = data.rows ? "rows" : "";
    more();
    let all = 0;
    for (let i = 0; i < data.n; i++) all += matches(i);
    by("count").textContent = all.toLocaleString() + " samples match, " + looked.toLocaleString() + " of them to look at.";
    const used = Object.entries(state).filter(([key, value]) => value !== START[key]);
    history.replaceState(null, "", "#" + new URLSearchParams(used.map(([key, value]) => [key, value === true ? 1 : value])));
    paint();
  }

  // The map: keep rate from yellow over green to blue, dark on a light ground.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hue = k => `hsl(${55 + k * 0.9} 75% ${62 + k * (dark.matches ? 0.04 : -0.14)}%)`;
  const canvas = by("map"), LEFT = 46, BOTTOM = 34, TOP = 8;
  const spreads = Array.from(col.spread).filter(Number.isFinite).sort((a, b) => a - b);
  const most = {x: spreads[Math.floor(0.999 * spreads.length)] || 1, y: data.scale.loss};
  const place = (i, width, height) => [
    LEFT + Math.min(1, col.spread[i] / most.x) * (width - LEFT - 8),
    height - BOTTOM - Math.min(1, col.mean[i] / most.y) * (height - BOTTOM - TOP)];
  const outside = i => col.spread[i] > most.x || col.mean[i] > most.y;
  const clipped = Array.from(col.spread).filter((_, i) => outside(i)).length;
  if (clipped)
    by("outside").textContent = clipped.toLocaleString() + (clipped > 1 ? " samples lie" : " sample lies")
      + " beyond the axes: triangles at the edge.";

  // A triangle that points out of the map, where a sample lies beyond an axis.
  function arrow(pen, x, y, above, right) {
    const [dx, dy] = [right ? 1 : 0, above ? -1 : 0], long = Math.hypot(dx, dy), [a, b] = [dx / long * 6, dy / long * 6];
    pen.beginPath();
    pen.moveTo(x + a, y + b);
    pen.lineTo(x - a - b * 0.8, y - b + a * 0.8);
    pen.lineTo(x - a + b * 0.8, y - b - a * 0.8);
    pen.fill();
  }
  function paint() {
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    const shades = Array.from({length: 201}, (_, k) => hue(k));
    by("scale").querySelector("span").style.background =
      "linear-gradient(to right, " + [0, 50, 100, 150, 200].map(k => shades[k]).join(", ") + ")";
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d"), ink = getComputedStyle(document.body).getPropertyValue("--ink-2");
    pen.scale(ratio, ratio);
    const all = !state.wrong && !state.always && !oneLabel() && state.predicted === "";
    for (const turn of all ? [1] : [0, 1])
      for (let i = data.n - 1; i >= 0; i--) {
        const match = all || matches(i);
        if (match !== (turn === 1)) continue;
        pen.globalAlpha = match ? (data.n > 20000 ? 0.45 : 0.7) : 0.06;
        pen.fillStyle = shades[Math.min(200, col.keep[i])];
        const [x, y] = place(i, width, height), size = data.n > 5000 ? 2 : 4;
        if (outside(i)) arrow(pen, x, y, col.mean[i] > most.y, col.spread[i] > most.x);
        else pen.fillRect(x - size / 2, y - size / 2, size, size);
      }
    pen.globalAlpha = 1;
    pen.fillStyle = pen.strokeStyle = ink;
    pen.font = "12px system-ui, sans-serif";
    pen.beginPath();
    pen.moveTo(LEFT, TOP);
    pen.lineTo(LEFT, height - BOTTOM);
    pen.lineTo(width - 8, height - BOTTOM);
    pen.stroke();
    pen.textAlign = "right";
    for (const part of [0, 0.5, 1]) {
      pen.fillText((part * most.y).toPrecision(2), LEFT - 6, height - BOTTOM - part * (height - BOTTOM - TOP) + 8 * (part === 1));
      pen.fillText((part * most.x).toPrecision(2), LEFT + part * (width - LEFT - 8) + 8 * (part === 0), height - BOTTOM + 15);
    }
    pen.textAlign = "center";
    pen.fillText("standard deviation of the loss", (LEFT + width) / 2, height - 5);
    pen.rotate(-Math.PI / 2);
    pen.fillText("mean loss", -(height - BOTTOM) / 2, 11);
  }
  function point(event) {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = -1, least = 144;
    for (let i = 0; i < data.n; i++) {
      const [a, b] = place(i, box.width, box.height), far = (a - x) ** 2 + (b - y) ** 2;
      if (far < least && matches(i)) [best, least] = [i, far];
    }
    by("dot").replaceChildren();
    if (best < 0) return;
    by("dot").append(card(best, 96));
    by("dot").style.left = Math.min(x + 22, box.width - 150) + "px";
    by("dot").style.top = Math.max(0, Math.min(y + 16, box.height - 190)) + "px";
  }
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", () => by("dot").replaceChildren());
  addEventListener("resize", paint);
  dark.addEventListener("change", paint);

  // Pairs by how many of the samples to look at, the hard ones, they hold; beside it, of all samples.
  const counts = new Map();
  for (let i = 0; i < data.n; i++)
    if (differs(i)) {
      const key = col.label[i] + "," + col.predicted[i], count = counts.get(key) || [0, 0];
      counts.set(key, [count[0] + slot.has(i), count[1] + 1]);
    }
  const pairs = [...counts].sort(([, a], [, b]) => b[0] - a[0] || b[1] - a[1]).slice(0, 24);
  for (const [pair, [hard, all]] of pairs) {
    const [label, predicted] = pair.split(","), button = make("button"), tally = make("b", "", hard.toLocaleString());
    tally.append(make("small", "", " of " + all.toLocaleString()));
    button.append(make("span", "", name(label) + " → " + name(predicted)), tally);
    button.addEventListener("click", () => {
      Object.assign(state, {label, predicted, wrong: false});
      refresh();
      by("cards").scrollIntoView({block: "center"});
    });
    by("pairs").append(button);
  }
  if (!pairs.length) by("pairs").append(make("p", "note", "No prediction differs from its label, or none was recorded."));

  for (const id of ["label", "predicted", "sort"]) by(id).addEventListener("change", () => { state[id] = by(id).value; refresh(); });
  for (const id of ["wrong", "always"]) by(id).addEventListener("change", () => { state[id] = by(id).checked; refresh(); });
  by("reset").addEventListener("click", () => { Object.assign(state, START); refresh(); });
  by("more").addEventListener("click", more);
  const read = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const [key, start] of Object.entries(START))
      state[key] = !given.has(key) ? start : typeof start === "boolean" ? given.get(key) === "1" : given.get(key);
  };
  read();
  refresh();
  addEventListener("hashchange", () => { read(); refresh(); });
  // Said in the page for tests and the curious: how many thumbnails sheets the browser could decode.
  const sheets = Array.from({length: data.sheets || 0}, (_, k) => {
    const probe = make("div", "t" + k), image = new Image();
    document.body.append(probe);
    image.src = getComputedStyle(probe).backgroundImage.slice(5, -2);
    probe.remove();
    return image.decode().then(() => image.naturalWidth > 0, () => false);
  });
  Promise.all(sheets).then(done => { document.body.dataset.sheets = done.filter(Boolean).length; });
}
