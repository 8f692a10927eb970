(() => {
  const cards = [...document.querySelectorAll("article.item")];
  const texts = cards.map(card => card.textContent.toLowerCase());
  const form = document.querySelector("form.filters");
  const count = document.getElementById("count");
  const search = form.elements.search;
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const { split, stratum } = form.elements;
    let shown = 0;
    cards.forEach((card, index) => {
      const fits = (!split.value || card.dataset.split === split.value)
        && (!stratum.value || card.dataset.stratum === stratum.value)
        && words.every(word => texts[index].includes(word));
      card.hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} of ${cards.length} questions shown`;
  };
  const step = by => {
    const shown = cards.filter(card => !card.hidden);
    const here = shown.findIndex(card => card.contains(document.activeElement));
    const next = shown[here < 0 ? 0 : Math.min(Math.max(here + by, 0), shown.length - 1)];
    if (next) next.focus();
  };
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  document.addEventListener("keydown", event => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "Escape" && event.target === search) { search.value = ""; filter(); }
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") { event.preventDefault(); search.focus(); }
    if (event.key === "j") step(1);
    if (event.key === "k") step(-1);
  });
  filter();
})();
