// The models: which one answers, a menu of the others, and how far one is that loads.
"use strict";

(function () {
  const brook = (window.brook = window.brook || {});
  const STATES = { ready: "loaded", loading: "loading" };

  const short = (id) => id.replace(/[/\\]+$/, "").replace(/^.*[/\\]/, "");

  // Makes the header's part; `choose` takes a model's name. show({model, models, open, loading, problem, failed}).
  brook.makeModelMenu = function (choose) {
    const root = element("div", "model");
    const opener = element("button", "model-opener");
    const dot = element("i", "");
    const name = element("span", "");
    opener.type = "button";
    opener.setAttribute("aria-haspopup", "dialog");
    opener.append(dot, name);
    opener.insertAdjacentHTML("beforeend", brook.icon("chevron"));

    const panel = element("div", "model-panel");
    panel.popover = "auto"; // closes on Escape, and on a press beside it
    panel.setAttribute("role", "dialog");
    panel.setAttribute("aria-label", "Choose a model");
    const list = element("div", "model-list");
    const form = element("form", "model-form");
    const label = element("label", "");
    label.textContent = "Any other model";
    const field = element("input", "");
    field.placeholder = "Hub id, folder or .gguf file";
    field.autocomplete = field.autocapitalize = "off";
    field.spellcheck = false;
    const load = element("button", "");
    load.type = "submit";
    load.textContent = "Load";
    label.append(field);
    form.append(label, load);
    panel.append(list, form);
    opener.popoverTargetElement = panel;
    panel.addEventListener("toggle", (event) => {
      opener.setAttribute("aria-expanded", String(event.newState === "open"));
      if (event.newState !== "open") return;
      const at = opener.getBoundingClientRect();
      panel.style.top = `${at.bottom + 4}px`;
      panel.style.right = `${Math.min(document.documentElement.clientWidth - at.right, innerWidth - panel.offsetWidth - 8)}px`;
      const current = list.querySelector("[aria-current]") || list.firstChild;
      if (current) current.focus();
    });
    panel.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      const stops = [...panel.querySelectorAll("button, input")].filter((stop) => stop.offsetParent);
      if (!step || !stops.includes(document.activeElement)) return;
      event.preventDefault();
      stops[(stops.indexOf(document.activeElement) + step + stops.length) % stops.length].focus();
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) pick(field.value.trim());
      field.value = "";
    });

    const bar = element("div", "model-bar");
    bar.setAttribute("role", "progressbar");
    bar.setAttribute("aria-label", "Loading the model");
    const fill = element("div", "");
    bar.append(fill);

    const problem = element("div", "model-problem");
    problem.setAttribute("role", "alert");

    function pick(id) {
      panel.hidePopover();
      opener.focus();
      choose(id);
    }

    function show({ model = "", models = [], open = false, loading = null, problem: trouble = "", failed = false }) {
      const current = models.find(({ id }) => id === model);
      const id = current ? current.label : model;
      name.textContent = short(id);
      name.title = id;
      root.dataset.state = failed ? "failed" : loading ? "loading" : "ready";
      const hasChoice = open || models.length > 1;
      opener.disabled = !hasChoice;
      opener.setAttribute("aria-label", hasChoice ? `Model: ${id}. Choose another` : `Model: ${id}`);
      form.hidden = !open;
      list.replaceChildren(
        ...models.map(({ id, label: words, state }) => {
          const item = element("button", "model-item");
          item.type = "button";
          item.title = words;
          if (id === model) item.setAttribute("aria-current", "true");
          const label = element("span", "");
          label.textContent = short(words);
          const note = element("small", "");
          note.textContent = STATES[state] || "";
          item.append(label, note);
          item.addEventListener("click", () => pick(id));
          return item;
        }),
      );
      bar.hidden = !loading;
      const part = loading && loading.part;
      bar.classList.toggle("unknown", part === null);
      fill.style.width = part === null ? "" : `${100 * part}%`;
      if (part === null) bar.removeAttribute("aria-valuenow");
      else bar.setAttribute("aria-valuenow", Math.round(100 * part));
      bar.title = loading ? loading.words : "";
      tell(trouble);
    }

    function tell(words) {
      if (problem.dataset.words === words) return;
      problem.dataset.words = words;
      problem.replaceChildren();
      if (!words) return;
      const text = element("span", "");
      text.textContent = words;
      const close = element("button", "");
      close.type = "button";
      close.setAttribute("aria-label", "Close this message");
      close.innerHTML = brook.icon("close");
      close.addEventListener("click", () => tell(""));
      problem.append(text, close);
    }

    root.append(opener, panel, bar, problem);
    return { root, show };
  };

  function element(name, className) {
    const node = document.createElement(name);
    node.className = className;
    return node;
  }
})();
