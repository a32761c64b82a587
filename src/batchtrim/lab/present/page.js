"use strict";
// The page reads well without this. It adds: names that bring their lines forward, and values under the pointer.
for (const section of document.querySelectorAll("section")) {
  const legend = section.querySelector(".legend");
  if (!legend) continue;
  const light = name => {
    for (const part of [legend, ...section.querySelectorAll("svg.lines")]) part.classList.toggle("dim", name !== null);
    for (const each of section.querySelectorAll("[data-series]"))
      each.classList.toggle("on", each.dataset.series === name);
  };
  for (const item of legend.children) {
    item.addEventListener("pointerenter", () => light(item.dataset.series));
    item.addEventListener("pointerleave", () => light(null));
  }
}
const box = document.createElement("div");
box.className = "reader";
for (const svg of document.querySelectorAll("svg.lines")) {
  const {plot: [left, right, top, bottom], x: [low, high], series} = JSON.parse(svg.dataset.read);
  const rule = document.createElementNS(svg.namespaceURI, "line");
  rule.setAttribute("class", "base");
  rule.setAttribute("y1", top);
  rule.setAttribute("y2", bottom);
  svg.addEventListener("pointermove", event => {
    const place = svg.getBoundingClientRect();
    const at = (event.clientX - place.left) / place.width * svg.viewBox.baseVal.width;
    const want = low + (at - left) / (right - left) * (high - low);
    const nearest = xs => xs.reduce((best, x, i) => Math.abs(x - want) < Math.abs(xs[best] - want) ? i : best, 0);
    const x = series[0].x[nearest(series[0].x)];
    const heading = document.createElement("div");
    heading.textContent = "epoch " + x;
    box.replaceChildren(heading, ...series.filter(each => each.x.includes(x)).map(each => {
      const row = document.createElement("div");
      const key = document.createElement("i");
      key.className = "key " + each.css;
      const value = document.createElement("b");
      value.textContent = each.y[each.x.indexOf(x)];
      row.append(key, each.label, value);
      return row;
    }));
    const line = left + (x - low) / (high - low) * (right - left);
    rule.setAttribute("x1", line);
    rule.setAttribute("x2", line);
    svg.append(rule);
    document.body.append(box);
    const beyond = event.clientX + 16 + box.offsetWidth > document.documentElement.clientWidth;
    const shift = beyond ? -16 - box.offsetWidth : 16;
    box.style.left = Math.max(4, event.pageX + shift) + "px";
    box.style.top = event.pageY + 12 + "px";
  });
  svg.addEventListener("pointerleave", () => { rule.remove(); box.remove(); });
}
addEventListener("beforeprint", () => { for (const each of document.querySelectorAll("details")) each.open = true; });
