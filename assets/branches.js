// What a conversation holds beside what it shows: other versions of its messages; and what people think of replies.
"use strict";

(function () {
  const brook = (window.brook = window.brook || {});
  const element = (name, className) => Object.assign(document.createElement(name), { className });

  function button(name, label, act) {
    const node = element("button", `action ${name}`);
    node.type = "button";
    node.title = label;
    node.setAttribute("aria-label", label);
    node.innerHTML = brook.icon(name);
    node.addEventListener("click", act);
    return node;
  }

  // Arrows between a message and its siblings: `2 / 3`. Nothing where it has none.
  brook.makeBranchSwitch = function (siblings, id, choose) {
    if (siblings.length < 2) return [];
    const at = siblings.indexOf(id);
    const root = element("div", "branch-switch");
    root.setAttribute("role", "group");
    root.setAttribute("aria-label", `Version ${at + 1} of ${siblings.length}`);
    const place = element("span", "");
    place.textContent = `${at + 1} / ${siblings.length}`;
    const previous = button("previous", "The version before", () => choose(siblings[at - 1]));
    const next = button("next", "The next version", () => choose(siblings[at + 1]));
    previous.disabled = at === 0;
    next.disabled = at === siblings.length - 1;
    root.append(previous, place, next);
    return [root];
  };

  // A small view of the tree: a line for each message, set in where the conversation forks.
  // `live` gives the last reply, which has grown since the tree was told. Its button stands in the header.
  function makeTree() {
    let choose = () => {};
    let live = () => null;
    const root = element("div", "tree-box");
    const opener = button("fork", "Branches of this chat", () => {});
    opener.className = "icon fork";
    const panel = element("div", "tree-panel");
    panel.popover = "auto";
    panel.setAttribute("role", "dialog");
    panel.setAttribute("aria-label", "Branches of this chat");
    opener.setAttribute("aria-haspopup", "dialog");
    opener.popoverTargetElement = panel;
    root.append(opener, panel);
    root.hidden = true;

    panel.addEventListener("beforetoggle", () => {
      const grown = live();
      const line = grown && panel.querySelector(`[data-id="${CSS.escape(grown.id)}"]`);
      if (line && grown.text) line.textContent = grown.text.slice(0, 60);
    });
    panel.addEventListener("toggle", (event) => {
      if (event.newState !== "open") return;
      const at = opener.getBoundingClientRect();
      panel.style.top = `${at.bottom + 4}px`;
      panel.style.right = `${Math.min(document.documentElement.clientWidth - at.right, innerWidth - panel.offsetWidth - 8)}px`;
      const current = panel.querySelector("[aria-current]");
      if (current) current.focus();
    });
    panel.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      const stops = [...panel.children];
      const next = step && stops[stops.indexOf(document.activeElement) + step];
      if (!next) return;
      event.preventDefault();
      next.focus();
    });

    function show(messages) {
      root.hidden = !messages.length;
      const below = new Map();
      for (const message of messages) below.set(message.parent, [...(below.get(message.parent) || []), message]);
      const lines = [];
      const shown = messages.filter((message) => message.shown);
      const last = shown.length ? shown[shown.length - 1].id : null;
      const waiting = (below.get(null) || []).map((message) => [message, 0]).reverse();
      while (waiting.length) {
        const [message, depth] = waiting.pop();
        const line = element("button", `tree-line ${message.role}`);
        line.type = "button";
        line.dataset.id = message.id;
        line.dir = "auto";
        line.textContent = message.text || "No text";
        line.classList.toggle("shown", message.shown);
        line.style.setProperty("--depth", depth);
        if (message.id === last) line.setAttribute("aria-current", "true");
        line.addEventListener("click", () => {
          panel.hidePopover();
          choose(message.id);
        });
        lines.push(line);
        const children = below.get(message.id) || [];
        for (const child of [...children].reverse()) waiting.push([child, depth + (children.length > 1)]);
      }
      panel.replaceChildren(...lines);
    }
    return { root, show, connect: (onChoose, getLive) => ([choose, live] = [onChoose, getLive]) };
  }
  brook.tree = makeTree();

  // Thumbs: `row.rating` and `row.note` are what was said last, here or on the server.
  brook.showRating = function (row) {
    if (!row.reply) return;
    const { id, rating, note } = row.message;
    const key = `${id} ${rating} ${note}`;
    if (row.ratedAs !== key) Object.assign(row, { ratedAs: key, rating, note });
    mark(row);
  };

  brook.rate = function (row, name, tell) {
    const wanted = name === "good" ? 1 : -1;
    row.rating = row.rating === wanted ? 0 : wanted;
    if (!row.rating) row.note = "";
    mark(row);
    tell({ id: row.message.id, rating: row.rating, note: row.note });
    const old = row.root.querySelector(".feedback");
    if (old) old.remove();
    if (row.rating) ask(row, tell);
  };

  function mark(row) {
    for (const [name, value] of [["good", 1], ["bad", -1]]) {
      const thumb = row.actions.querySelector(`.action.${name}`);
      if (thumb) thumb.setAttribute("aria-pressed", String(row.rating === value));
    }
    row.root.classList.toggle("rated", Boolean(row.rating));
  }

  function ask(row, tell) {
    const form = element("form", "feedback");
    const field = element("input", "");
    field.placeholder = row.rating > 0 ? "What was good about it? (optional)" : "What was wrong with it? (optional)";
    field.setAttribute("aria-label", field.placeholder);
    field.maxLength = 2000;
    field.dir = "auto";
    field.value = row.note;
    const save = element("button", "");
    save.type = "submit";
    save.textContent = "Save";
    form.append(field, save);
    const close = () => {
      form.remove();
      const thumb = row.actions.querySelector(row.rating > 0 ? ".action.good" : ".action.bad");
      if (thumb) thumb.focus();
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      row.note = field.value.trim();
      tell({ id: row.message.id, rating: row.rating, note: row.note });
      close();
    });
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      close();
    });
    row.root.append(form);
    field.focus();
  }
})();
