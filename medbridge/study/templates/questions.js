// The questions: a list whose rows are all of one height, of which only those in view are in the page, and one question
// opened beside it. No text becomes HTML.
(() => {
  const data = JSON.parse(document.getElementById("items").textContent);
  const height = 77;
  const beyond = 6; // rows drawn above and below those in view
  const statuses = [
    { name: "correct", words: "right", mark: "✓" },
    { name: "wrong", words: "wrong", mark: "✗" },
    { name: "abstain", words: "unreadable", mark: "–" },
  ];

  const view = document.getElementById("viewport");
  const list = document.getElementById("list");
  const detail = document.getElementById("detail");
  const count = document.getElementById("count");
  const said = document.getElementById("said");
  const tools = document.getElementById("filters");
  const field = (name) => document.getElementById("filter-" + name);
  let chosen = []; // the questions that the filters let through
  let current = 0; // the row that the arrow keys start from
  let opened = null; // the question shown in `detail`
  const rows = new Map(); // those in the page, by place

  function element(kind, text, className) {
    const made = document.createElement(kind);
    if (text) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  // -- filters -----------------------------------------------------------------------------------------------

  function share(item, model) {
    const found = item.counts[model];
    return found ? found[0] / found[1] : null;
  }

  function changed(item, before, after) {
    const [one, other] = [item.counts[before], item.counts[after]];
    if (!one || !other) return null;
    return Math.sign(other[0] * one[1] - one[0] * other[1]); // without a rounded quotient
  }

  function matches(item, wanted) {
    if (wanted.stratum !== "" && item.stratum !== Number(wanted.stratum)) return false;
    if (wanted.fate) {
      const part = share(item, wanted.model);
      if (part === null || wanted.fate !== (part === 0 ? "never" : part === 1 ? "always" : "some")) return false;
    }
    if (wanted.greedy !== "") {
      const found = item.counts[wanted.model];
      if (!found || found[2] !== Number(wanted.greedy)) return false;
    }
    if (wanted.change && changed(item, wanted.before, wanted.after) !== (wanted.change === "gained" ? 1 : -1)) return false;
    return wanted.words.every((word) => item.text.includes(word));
  }

  function filter() {
    const wanted = { words: field("text").value.toLowerCase().split(/\s+/).filter(Boolean) };
    for (const name of ["stratum", "model", "fate", "greedy", "change", "before", "after"]) wanted[name] = field(name).value;
    chosen = data.items.filter((item) => matches(item, wanted));
    count.textContent = chosen.length.toLocaleString("en") + " of " + data.items.length.toLocaleString("en") + " questions";
    list.style.height = chosen.length * height + "px";
    list.replaceChildren();
    rows.clear();
    current = 0;
    view.scrollTop = 0;
    if (opened && !chosen.includes(opened)) close();
    else draw();
  }

  const shown = (at) => (at === null ? "" : data.pictures[at]);

  // -- the list ----------------------------------------------------------------------------------------------

  function told(found) {
    if (!found) return "not asked";
    return found[0] + " of " + found[1] + " right" + (found[2] === null ? "" : ", greedy " + statuses[found[2]].words);
  }

  function row(item, at) {
    const made = element("div", "", "entry");
    made.style.top = at * height + "px";
    made.setAttribute("role", "listitem");
    made.setAttribute("aria-setsize", chosen.length);
    made.setAttribute("aria-posinset", at + 1);
    const button = element("button");
    button.type = "button";
    button.setAttribute("aria-controls", "detail");
    button.addEventListener("click", () => (opened === item ? close() : open(at)));
    const [source] = item.pictures.map(shown);
    const picture = element(source ? "img" : "span");
    if (source) {
      picture.src = source;
      picture.alt = "";
    }
    const what = element("span", "", "what");
    what.append(element("bdi", item.question, "number"));
    what.append(element("bdi", "Answer: " + item.answer + (item.options ? "  (of " + item.options.join(" · ") + ")" : "")));
    const several = item.pictures.length > 1 ? " · " + item.pictures.length + " images" : "";
    what.append(element("bdi", data.strata[item.stratum] + " · " + item.id + several, "note"));
    const counts = element("span", "", "counts");
    data.models.forEach((name, model) => {
      const count = element("span", "", "count");
      count.append(element("bdi", name), element("span", ": " + told(item.counts[model])));
      counts.append(count);
    });
    button.append(picture, what, counts);
    made.append(button);
    return made;
  }

  function draw() {
    const first = Math.max(0, Math.floor(view.scrollTop / height) - beyond);
    const last = Math.min(chosen.length, Math.ceil((view.scrollTop + view.clientHeight) / height) + beyond);
    const kept = list.contains(document.activeElement) ? current : -1; // the focus stays where it is scrolled away
    const wanted = [];
    for (let at = first; at < last; at += 1) wanted.push(at);
    if (kept >= last) wanted.push(kept);
    if (kept >= 0 && kept < first) wanted.unshift(kept);
    const within = new Set(wanted);
    for (const [at, made] of rows) {
      if (!within.has(at)) {
        made.remove();
        rows.delete(at);
      }
    }
    let next = list.firstChild; // rows stand in their order, and none that is there moves: it would lose the focus
    for (const at of wanted) {
      if (rows.has(at)) {
        next = rows.get(at).nextSibling;
        continue;
      }
      rows.set(at, row(chosen[at], at));
      list.insertBefore(rows.get(at), next);
    }
    // One row can be reached by Tab, the arrow keys lead on from there.
    const stop = rows.has(current) ? current : Math.ceil(view.scrollTop / height);
    for (const [at, made] of rows) {
      made.classList.toggle("opened", chosen[at] === opened);
      made.firstChild.setAttribute("aria-expanded", chosen[at] === opened);
      made.firstChild.tabIndex = at === stop ? 0 : -1;
    }
  }

  /** Bring the row at a place into view, and the focus to it. */
  function go(at) {
    if (!chosen.length) return;
    current = Math.min(chosen.length - 1, Math.max(0, at));
    const top = current * height;
    if (top < view.scrollTop) view.scrollTop = top;
    else if (top + height > view.scrollTop + view.clientHeight) view.scrollTop = top + height - view.clientHeight;
    draw();
    rows.get(current).firstChild.focus({ preventScroll: true });
    draw();
  }

  // -- one question ------------------------------------------------------------------------------------------

  function written(pieces) {
    const text = element("bdi");
    for (const piece of pieces) {
      if (typeof piece === "string") text.append(piece);
      else if (Array.isArray(piece)) text.append(element("mark", piece[0]));
      else text.append(element("span", "[… " + piece.gap + " …]", "gap"));
    }
    return text;
  }

  function completion(item, [sample, code, read, cut, ...pieces]) {
    const status = statuses[code];
    const made = element("li", "", status.name);
    const head = element("p", "", "head");
    const verdict = element("span", "", "status " + status.name);
    const mark = element("span", status.mark + " ");
    mark.setAttribute("aria-hidden", "true");
    verdict.append(mark, status.words);
    head.append(verdict, element("span", sample < 0 ? "greedy" : "sample " + (sample + 1), "which"));
    const said = element("span", read === null ? "no answer could be read" : "read as ", "which");
    if (read !== null) said.append(element("bdi", typeof read === "number" ? item.options[read] : read, "read"));
    head.append(said);
    if (cut) head.append(element("span", "cut off at the most tokens", "which"));
    const text = element("p", "", "text");
    text.append(pieces.length ? written(pieces) : element("span", "[empty]", "gap"));
    made.append(head, text);
    return made;
  }

  function answers(item, model) {
    const made = element("section");
    const title = element("h4");
    title.id = "detail-model-" + model;
    title.append(element("bdi", data.models[model]), element("small", " " + told(item.counts[model])));
    made.setAttribute("aria-labelledby", title.id);
    made.append(title);
    const found = item.answers ? item.answers[model] : [];
    if (found.length) {
      const several = element("ol", "", "completions");
      several.append(...found.map((entry) => completion(item, entry)));
      made.append(several);
    }
    return made;
  }

  /** Every image of a question, in the order in which it is asked about. */
  function pictures(item) {
    const made = element("ol", "", "pictures");
    item.pictures.map(shown).forEach((source, at) => {
      const entry = element("li");
      const number = item.pictures.length > 1 ? " " + (at + 1) + " of " + item.pictures.length : "";
      if (source) {
        const picture = element("img");
        picture.src = source;
        picture.alt = "Image" + number + " of the question";
        entry.append(picture);
      } else entry.append(element("span", "Image" + number + " is not in this page.", "note"));
      made.append(entry);
    });
    return made;
  }

  function options(item) {
    if (!item.options) {
      const made = element("p", "Right answer: ");
      made.append(element("bdi", item.answer, "right-answer"));
      return made;
    }
    const made = element("ul", "", "options");
    item.options.forEach((option, at) => {
      const entry = element("li", "", at === item.right ? "right-answer" : "");
      entry.append(element("bdi", option));
      if (at === item.right) entry.append(" ", element("span", "right answer", "tick"));
      made.append(entry);
    });
    return made;
  }

  function show(item) {
    const top = element("div", "", "detail-head");
    const title = element("h3");
    title.id = "detail-title";
    title.append(element("bdi", item.question));
    const button = element("button", "Close");
    button.type = "button";
    button.id = "detail-close";
    button.addEventListener("click", close);
    top.append(title, button);
    const asked = element("div", "", "asked-with");
    if (item.pictures.length) asked.append(pictures(item));
    const place = element("p", "", "note");
    place.append(element("bdi", data.strata[item.stratum] + " · " + item.id));
    const answer = element("div");
    answer.append(options(item), place);
    asked.append(answer);
    const parts = [top, asked];
    if (!item.whole) {
      const left = item.answers ? "Sampled completions were" : "The completions were";
      parts.push(element("p", left + " left out to keep this page small; the run's folder has them.", "note left-out"));
    }
    data.models.forEach((name, model) => parts.push(answers(item, model)));
    detail.replaceChildren(...parts);
    detail.scrollTop = 0;
  }

  function open(at) {
    current = at;
    opened = chosen[at];
    show(opened);
    detail.hidden = false;
    detail.parentElement.classList.add("with-detail");
    draw();
    detail.scrollIntoView({ block: "nearest" });
    said.textContent = "Answers shown after the list. Tab leads there, Escape closes them.";
  }

  /** Close the question that is shown; the focus goes back to its row if it was in there. */
  function close() {
    if (!opened) return;
    const inside = detail.contains(document.activeElement);
    const at = chosen.indexOf(opened);
    opened = null;
    detail.hidden = true;
    detail.parentElement.classList.remove("with-detail");
    detail.replaceChildren();
    said.textContent = "Answers closed.";
    if (inside && at >= 0) go(at);
    else draw();
  }

  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 6, PageUp: -6, Home: -Infinity, End: Infinity };
  list.addEventListener("keydown", (event) => {
    if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    go(current + steps[event.key]);
  });
  list.addEventListener("focusin", (event) => {
    for (const [at, made] of rows) if (made.contains(event.target)) current = at;
  });
  detail.parentElement.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
  });
  for (const item of data.items) item.text = (item.question + " " + item.answer + " " + item.id).toLowerCase();
  tools.addEventListener("input", filter);
  field("clear").addEventListener("click", () => {
    tools.reset();
    filter();
  });
  tools.addEventListener("submit", (event) => event.preventDefault());
  view.addEventListener("scroll", () => requestAnimationFrame(draw));
  window.addEventListener("resize", () => requestAnimationFrame(draw));
  filter();
})();
