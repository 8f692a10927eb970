"use strict";
// Drawings are saved as SVG and PNG, each with the page's style in it.
(() => {
  const style = document.getElementById("style").textContent;

  const namespace = "http://www.w3.org/2000/svg";

  function part(kind, values, text) {
    const made = document.createElementNS(namespace, kind);
    for (const [name, value] of Object.entries(values)) made.setAttribute(name, value);
    if (text) made.textContent = text;
    return made;
  }

  /** The sample of a legend's entry, as its element looks in the page. */
  function sample(key, x, y) {
    const style = getComputedStyle(key);
    if (style.borderRadius === "50%") {
      const stroke = style.borderTopWidth === "0px" ? style.backgroundColor : style.borderTopColor;
      return part("circle", { cx: x + 11, cy: y, r: 4.5, style: `fill: ${style.backgroundColor}; stroke: ${stroke}; stroke-width: 2` });
    }
    const upright = style.borderLeftWidth !== "0px";
    const side = upright ? "Left" : "Top";
    const dashes = { dashed: "6 3", dotted: "2 3" }[style[`border${side}Style`]] || "none";
    const ends = upright ? { x1: x + 11, y1: y - 7, x2: x + 11, y2: y + 7 } : { x1: x, y1: y, x2: x + 22, y2: y };
    return part("line", { ...ends, style: `stroke: ${style[`border${side}Color`]}; stroke-width: 2; stroke-dasharray: ${dashes}` });
  }

  /** Caption and legend, which stand beside a drawing in the page, as parts of it; and the room that all takes. */
  function framed(figure, copy, box) {
    const caption = figure.querySelector("figcaption");
    if (!caption) return { top: 0, height: box.height };
    const ruler = document.createElement("canvas").getContext("2d");
    ruler.font = "11px sans-serif";
    copy.append(part("text", { x: 2, y: -8, style: "fill: var(--ink); font-size: 12px; font-weight: 600" }, caption.textContent.trim()));
    const legend = figure.closest("section").querySelector(".legend");
    let [x, y] = [2, box.height + 14];
    for (const entry of legend ? legend.children : []) {
      const words = entry.textContent.trim();
      const width = 42 + ruler.measureText(words).width;
      if (x > 2 && x + width > box.width) [x, y] = [2, y + 17];
      copy.append(sample(entry.querySelector(".key"), x, y - 4));
      copy.append(part("text", { x: x + 28, y, style: "fill: var(--ink); font-size: 11px" }, words));
      x += width;
    }
    return { top: -24, height: y + 8 + 24 };
  }

  function standalone(figure) {
    const svg = figure.querySelector("svg.chart");
    const copy = svg.cloneNode(true);
    const box = svg.viewBox.baseVal;
    const { top, height } = framed(figure, copy, box);
    copy.setAttribute("xmlns", namespace);
    copy.setAttribute("viewBox", `0 ${top} ${box.width} ${height}`);
    copy.setAttribute("width", box.width);
    copy.setAttribute("height", height);
    const css = part("style", {});
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

  function exportDrawing(figure, kind, name) {
    const text = standalone(figure);
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
      button.addEventListener("click", () => exportDrawing(figure, kind, figure.dataset.name));
      bar.append(button);
    }
    figure.prepend(bar);
  }
})();
