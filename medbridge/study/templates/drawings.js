"use strict";
// Drawings are saved as SVG and PNG, each with the page's style in it.
(() => {
  const style = document.getElementById("style").textContent;

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
})();
