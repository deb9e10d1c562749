// The sidebar: conversations by date, search, and what can be done with one.
"use strict";

(function () {
  const brook = (window.brook = window.brook || {});
  const DAY_MS = 24 * 3600 * 1000;
  const SEARCH_MS = 180;
  const UNDO_MS = 10000;

  // Under which heading a conversation stands, by the calendar here.
  function group(item, today) {
    if (item.pinned) return "Pinned";
    const days = Math.ceil((today - item.updated_at * 1000) / DAY_MS);
    if (days <= 0) return "Today";
    if (days === 1) return "Yesterday";
    if (days <= 7) return "The week before";
    if (days <= 30) return "The month before";
    return new Date(item.updated_at * 1000).toLocaleDateString(undefined, { month: "long", year: "numeric" });
  }

  // props.value: {items: [{id, title, active, busy, pinned, updated_at, excerpt}], search, notice}
  brook.mountConversations = function (root, props, watch, trigger) {
    const search = element("input", "conversation-search");
    search.type = "search";
    search.placeholder = "Search";
    search.setAttribute("aria-label", "Search conversations");
    const list = element("nav", "conversation-list");
    list.setAttribute("aria-label", "Conversations");
    const toast = element("div", "toast");
    toast.setAttribute("role", "status");
    root.replaceChildren(search, list, toast);

    let typed = 0;
    const find = () => trigger("search", { words: search.value });
    search.addEventListener("input", () => {
      clearTimeout(typed);
      typed = setTimeout(find, search.value ? SEARCH_MS : 0);
    });
    search.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && search.value) {
        event.stopPropagation();
        search.value = "";
        find();
      } else if (event.key === "ArrowDown") {
        event.preventDefault();
        move(list.querySelector(".open"));
      }
    });
    list.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step || !event.target.classList.contains("open")) return;
      event.preventDefault();
      const stops = [...list.querySelectorAll(".open")];
      move(stops[stops.indexOf(event.target) + step] || (step < 0 ? search : null));
    });
    const move = (node) => node && node.focus();

    const actions = {
      rename: (item) => rename(item),
      pin: (item) => trigger("pin", { id: item.id, pinned: !item.pinned }),
      save: (item) => brook.openFiles(item.id),
      remove: (item) => {
        trigger("delete", { id: item.id });
        tell(`“${item.title}” was deleted.`, () => trigger("restore", { id: item.id }));
      },
    };
    const menu = brook.makeMenu("What to do with this conversation", (name, item) => actions[name](item));

    const nodes = new Map(); // id → its node and what it shows, so that a long list changes where it changed
    function nodeOf(item) {
      const key = JSON.stringify(item);
      const known = nodes.get(item.id);
      if (known && known.key === key) return known.node;
      const node = element("div", "conversation");
      node.dataset.id = item.id;
      node.classList.toggle("active", item.active);
      node.classList.toggle("busy", item.busy);
      const open = element("button", "open");
      open.type = "button";
      const title = element("span", "title");
      title.dir = "auto";
      title.textContent = item.title;
      open.append(title);
      if (item.excerpt) {
        const excerpt = element("small", "excerpt");
        excerpt.dir = "auto";
        excerpt.textContent = item.excerpt;
        open.append(excerpt);
      }
      if (item.active) open.setAttribute("aria-current", "true");
      open.addEventListener("click", () => {
        trigger("select", { id: item.id, message: item.message_id || null });
        brook.closeOnPhones("sidebar");
      });
      node.append(open);
      if (item.id) {
        const more = element("button", "more");
        more.type = "button";
        more.title = "More";
        more.setAttribute("aria-label", `More for ${item.title}`);
        more.setAttribute("aria-haspopup", "menu");
        more.innerHTML = brook.icon("more");
        more.addEventListener("click", () =>
          menu.open(more, item, [
            ["rename", "Rename"],
            ["pin", item.pinned ? "Unpin" : "Pin"],
            ["save", "Export…"],
            ["remove", "Delete"],
          ]),
        );
        open.addEventListener("dblclick", () => rename(item));
        node.append(more);
      }
      nodes.set(item.id, { key, node });
      return node;
    }

    function rename(item) {
      const { node } = nodes.get(item.id);
      const field = element("input", "renaming");
      field.value = item.title;
      field.maxLength = 200;
      field.dir = "auto";
      field.setAttribute("aria-label", "Title");
      node.classList.add("is-renaming");
      node.prepend(field);
      field.select();
      let done = false;
      const finish = (keep) => {
        if (done) return;
        done = true;
        const title = field.value.trim();
        field.remove();
        node.classList.remove("is-renaming");
        if (keep && title && title !== item.title) trigger("rename", { id: item.id, title });
        move(node.querySelector(".open"));
      };
      field.addEventListener("blur", () => finish(true));
      field.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && !event.isComposing) finish(true);
        if (event.key === "Escape") {
          event.stopPropagation();
          finish(false);
        }
      });
      field.focus();
    }

    let fading = 0;
    function tell(words, undo) {
      clearTimeout(fading);
      const text = element("span", "");
      text.textContent = words;
      const button = element("button", "");
      button.type = "button";
      button.textContent = "Undo";
      button.addEventListener("click", () => {
        toast.replaceChildren();
        undo();
      });
      toast.replaceChildren(text, button);
      fading = setTimeout(() => toast.replaceChildren(), UNDO_MS);
    }

    const show = () => {
      const { items = [], search: searched = "", notice = "" } = props.value || {};
      brook.setKeeping(notice);
      if (searched !== search.value.trim()) {
        // It answers an older question. Where the list changed for another reason, ask again.
        if (search.value.trim()) {
          clearTimeout(typed);
          typed = setTimeout(find, SEARCH_MS);
          return;
        }
      }
      const today = new Date().setHours(0, 0, 0, 0);
      const wanted = [];
      let heading = "";
      for (const item of items) {
        const now = searched || !item.id ? "" : group(item, today);
        if (now && now !== heading) {
          const title = element("h2", "conversation-group");
          title.textContent = now;
          wanted.push(title);
        }
        heading = now || heading;
        wanted.push(nodeOf(item));
      }
      if (!items.length && searched) {
        const none = element("p", "conversation-none");
        none.textContent = "Nothing found";
        wanted.push(none);
      }
      const ids = new Set(items.map((item) => item.id));
      for (const id of nodes.keys()) if (!ids.has(id)) nodes.delete(id);
      list.replaceChildren(...wanted);
    };
    watch("value", show);
    show();
  };

  // A menu that belongs to whichever button opened it.
  brook.makeMenu = function (label, choose) {
    const panel = element("div", "popup");
    panel.popover = "auto";
    panel.setAttribute("role", "menu");
    panel.setAttribute("aria-label", label);
    document.body.append(panel);
    let opener = null;
    panel.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const stops = [...panel.children];
      stops[(stops.indexOf(document.activeElement) + step + stops.length) % stops.length].focus();
    });
    panel.addEventListener("toggle", (event) => {
      if (opener) opener.setAttribute("aria-expanded", String(event.newState === "open"));
    });
    return {
      open(button, subject, entries) {
        opener = button;
        panel.replaceChildren(
          ...entries.map(([name, words]) => {
            const entry = element("button", `popup-item ${name}`);
            entry.type = "button";
            entry.setAttribute("role", "menuitem");
            entry.textContent = words;
            entry.addEventListener("click", () => {
              panel.hidePopover();
              choose(name, subject);
            });
            return entry;
          }),
        );
        panel.showPopover();
        const at = button.getBoundingClientRect();
        const box = panel.getBoundingClientRect();
        panel.style.left = `${Math.max(8, Math.min(at.left, innerWidth - box.width - 8))}px`;
        panel.style.top = `${at.bottom + box.height + 8 < innerHeight ? at.bottom + 4 : at.top - box.height - 4}px`;
        panel.firstChild.focus();
      },
    };
  };

  function element(name, className) {
    const node = document.createElement(name);
    node.className = className;
    return node;
  }
  brook.element = element;
})();
