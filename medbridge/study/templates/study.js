"use strict";
(() => {
  const data = JSON.parse(document.getElementById("items").textContent);
  const style = document.getElementById("style").textContent;
  const height = 77;

  // -- pictures of the drawings ------------------------------------------------------------------------------

  function standalone(svg) {
    const copy = svg.cloneNode(true);
    const box = svg.viewBox.baseVal;
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.setAttribute("width", box.width);
    copy.setAttribute("height", box.height);
    const css = document.createElementNS("http://www.w3.org/2000/svg", "style");
    css.textContent = style + " svg { background: var(--paper); font-family: sans-serif; }";
    copy.prepend(css);
    return new XMLSerializer().serializeToString(copy);
  }

  function save(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function exportDrawing(svg, kind, name) {
    const text = standalone(svg);
    if (kind === "svg") {
      save(new Blob([text], { type: "image/svg+xml" }), name + ".svg");
      return;
    }
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      canvas.width = 2 * image.width;
      canvas.height = 2 * image.height;
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(blob, name + ".png"), "image/png");
    };
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
  }

  for (const figure of document.querySelectorAll("figure[data-name]")) {
    const bar = document.createElement("div");
    bar.className = "export";
    for (const kind of ["svg", "png"]) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = kind.toUpperCase();
      button.setAttribute("aria-label", "Save " + figure.dataset.name + " as " + kind.toUpperCase());
      button.addEventListener("click", () => exportDrawing(figure.querySelector("svg.chart"), kind, figure.dataset.name));
      bar.append(button);
    }
    figure.prepend(bar);
  }

  // -- the questions: only those in view are in the page -------------------------------------------------------

  const view = document.getElementById("viewport");
  if (!view) return;
  const sizer = view.querySelector(".sizer");
  const count = document.getElementById("count");
  const field = (name) => document.getElementById("filter-" + name);
  let chosen = [];

  function matches(item, words, stratum, model, fate) {
    if (stratum && item.stratum !== stratum) return false;
    if (fate) {
      const entry = item.counts[model];
      if (!entry) return false;
      const [right, samples] = entry;
      if (fate === "never" && right !== 0) return false;
      if (fate === "some" && (right === 0 || right === samples)) return false;
      if (fate === "always" && right !== samples) return false;
    }
    return words.every((word) => item.text.includes(word));
  }

  function filter() {
    const words = field("text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const model = field("model").value;
    chosen = data.items.filter((item) => matches(item, words, field("stratum").value, model, field("fate").value));
    count.textContent = chosen.length.toLocaleString("en") + " of " + data.items.length.toLocaleString("en") + " questions";
    sizer.style.height = chosen.length * height + "px";
    view.scrollTop = 0;
    draw();
  }

  function element(kind, text, className) {
    const made = document.createElement(kind);
    if (text) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function entry(item, at) {
    const row = element("div", "", "entry");
    row.style.top = at * height + "px";
    row.setAttribute("role", "listitem");
    const source = item.picture === null ? "" : data.pictures[item.picture];
    const picture = element(source ? "img" : "span");
    if (source) {
      picture.src = source;
      picture.alt = "";
    }
    const what = element("div", "", "what");
    what.append(element("div", item.question, "number"));
    what.append(element("div", "Answer: " + item.answer + (item.options ? "  (of " + item.options.join(" · ") + ")" : "")));
    what.append(element("div", item.stratum + " · " + item.id, "note"));
    const counts = element("div", "", "counts");
    for (const name of data.models) {
      const found = item.counts[name];
      counts.append(element("div", name + ": " + (found ? found[0] + " of " + found[1] + (found[2] ? ", greedy right" : "") : "–")));
    }
    row.append(picture, what, counts);
    return row;
  }

  function draw() {
    const first = Math.max(0, Math.floor(view.scrollTop / height) - 4);
    const last = Math.min(chosen.length, first + Math.ceil(view.clientHeight / height) + 8);
    const rows = [];
    for (let at = first; at < last; at += 1) rows.push(entry(chosen[at], at));
    sizer.replaceChildren(...rows);
  }

  for (const item of data.items) item.text = (item.question + " " + item.answer + " " + item.id).toLowerCase();
  for (const name of ["text", "stratum", "model", "fate"]) field(name).addEventListener("input", filter);
  view.addEventListener("scroll", () => requestAnimationFrame(draw));
  filter();
})();
