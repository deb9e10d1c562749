// The page around the transcript: status line, conversations, drawers, theme, keyboard.
"use strict";

(function () {
  const brook = (window.brook = window.brook || {});
  const WIDE = window.matchMedia("(min-width: 1180px)");
  const ROOMY = window.matchMedia("(min-width: 820px)");
  const byId = (id) => document.getElementById(id);

  brook.busy = false;
  brook.tags = [["<think>", "</think>"]];
  let readiness = "";
  let shown = { words: "", state: "idle" };

  brook.setBusy = function (busy) {
    brook.busy = busy;
    document.body.classList.toggle("brook-busy", busy);
  };

  brook.setStatus = function (words, state) {
    shown = { words, state };
    const line = byId("status-line");
    if (!line) return;
    const text = words || (state === "idle" ? readiness : "");
    if (line.textContent !== text) line.textContent = text;
    // Readers of the screen hear how it begins and ends, not every token.
    line.setAttribute("aria-live", state === "reading" || state === "writing" ? "off" : "polite");
    line.dataset.state = words ? state : readiness ? "waiting" : "idle";
  };

  brook.mountStatus = function (root) {
    root.innerHTML = '<p id="status-line" role="status" data-state="idle"></p>';
    brook.setStatus(shown.words, shown.state);
    restoreDraft();
  };

  // What was typed and not sent outlives a reload, which is also how Gradio comes back after a lost connection.
  const draft = { key: "brook-draft", area: () => document.querySelector("#composer textarea") };
  window.addEventListener("pagehide", () => {
    if (draft.area()) store(draft.key, draft.area().value, () => sessionStorage);
  });
  function restoreDraft() {
    const text = stored(draft.key, () => sessionStorage);
    if (!text || !draft.area() || draft.area().value) return;
    draft.area().value = text;
    draft.area().dispatchEvent(new Event("input", { bubbles: true }));
  }

  // The header, with what the server says about the model: {model, readiness, failed, tags}
  brook.mountAbout = function (root, props, watch) {
    const model = Object.assign(document.createElement("div"), { className: "model" });
    const name = document.createElement("span");
    model.append(document.createElement("i"), name);
    root.append(
      button("menu", "Conversations", () => toggle("sidebar")),
      model,
      button("theme", "Light or dark", () => {
        const dark = !document.body.classList.contains("dark");
        setTheme(dark);
        store("brook-theme", dark ? "dark" : "light");
      }),
      button("settings", "Settings", () => toggle("settings")),
    );
    const show = () => {
      const about = props.value || {};
      name.textContent = name.title = (about.model || "").replace(/^.*[/\\]/, "");
      readiness = about.readiness || "";
      model.dataset.state = about.failed ? "failed" : readiness ? "loading" : "ready";
      brook.tags = about.tags || brook.tags;
      brook.setStatus(shown.words, shown.state);
    };
    watch("value", show);
    show();
  };

  brook.mountConversations = function (root, props, watch, trigger) {
    const show = () => {
      const nodes = (props.value || []).map((conversation) => {
        const item = document.createElement("div");
        item.className = "conversation";
        item.classList.toggle("active", conversation.active);
        item.classList.toggle("busy", conversation.busy);
        const open = document.createElement("button");
        open.type = "button";
        open.className = "open";
        open.dir = "auto";
        open.textContent = conversation.title;
        if (conversation.active) open.setAttribute("aria-current", "true");
        open.addEventListener("click", () => {
          trigger("select", { id: conversation.id });
          if (!ROOMY.matches) close("sidebar");
        });
        const remove = document.createElement("button");
        remove.type = "button";
        remove.className = "remove";
        remove.title = "Delete";
        remove.setAttribute("aria-label", `Delete ${conversation.title}`);
        remove.innerHTML = brook.icon("close");
        remove.addEventListener("click", () => trigger("delete", { id: conversation.id }));
        item.append(open, remove);
        return item;
      });
      root.replaceChildren(...nodes);
    };
    watch("value", show);
    show();
  };

  function button(name, title, onClick) {
    const node = Object.assign(document.createElement("button"), { type: "button", className: `icon ${name}`, title });
    node.setAttribute("aria-label", title);
    node.innerHTML = brook.icon(name);
    node.addEventListener("click", onClick);
    return node;
  }

  // Drawers: side by side where there is room, over the page where there is not.

  function isOpen(name) {
    return document.body.classList.contains(`${name}-open`);
  }
  function toggle(name) {
    const opens = !isOpen(name);
    if (opens && !WIDE.matches) close(name === "sidebar" ? "settings" : "sidebar");
    document.body.classList.toggle(`${name}-open`, opens);
    if (WIDE.matches) store(`brook-${name}-panel`, opens ? "open" : "closed");
  }
  function close(name) {
    document.body.classList.remove(`${name}-open`);
  }

  // Storage may be forbidden (private windows, some frames); the page works without.
  function store(key, value, where = () => localStorage) {
    try {
      where().setItem(key, value);
    } catch {
      return;
    }
  }
  function stored(key, where = () => localStorage) {
    try {
      return where().getItem(key);
    } catch {
      return null;
    }
  }

  function setTheme(dark) {
    document.body.classList.toggle("dark", dark);
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
  }

  function arrange() {
    document.body.classList.toggle("sidebar-open", ROOMY.matches && stored("brook-sidebar-panel") !== "closed");
    document.body.classList.toggle("settings-open", WIDE.matches && stored("brook-settings-panel") !== "closed");
  }

  function typesText(node) {
    return node && (node.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(node.tagName));
  }

  document.addEventListener(
    "keydown",
    (event) => {
      const inComposer = event.target.closest && event.target.closest("#composer");
      if (event.key === "Enter" && inComposer && (event.isComposing || (brook.busy && !event.shiftKey))) {
        // Enter ends a composed character, and waits while a reply is written: the text stays.
        event.stopPropagation();
        if (!event.isComposing) event.preventDefault();
      } else if (event.key === "Escape") {
        if (typesText(event.target) && event.target.classList.contains("editor")) return;
        const stops = [byId("complete-stop"), byId("stop")].filter((stop) => stop && stop.offsetParent);
        if (stops.length) stops[0].click();
        if (!ROOMY.matches) ["sidebar", "settings"].forEach(close);
      } else if (event.key === "/" && !typesText(event.target) && !event.ctrlKey && !event.metaKey) {
        const area = document.querySelector("#composer textarea");
        if (area) {
          event.preventDefault();
          area.focus();
        }
      }
    },
    true,
  );

  // Gradio's fields are left to right; what people write has a direction of its own.
  document.addEventListener("focusin", (event) => {
    if (event.target.tagName === "TEXTAREA") event.target.dir = "auto";
  });

  document.addEventListener("click", (event) => {
    const outside = !event.target.closest("#sidebar, #settings, #header");
    if (outside && !WIDE.matches) {
      close("settings");
      if (!ROOMY.matches) close("sidebar");
    }
    if (event.target.closest("#new-chat")) {
      if (!ROOMY.matches) close("sidebar");
      const area = document.querySelector("#composer textarea");
      if (area) area.focus();
    }
  });

  const saved = stored("brook-theme");
  if (saved) setTheme(saved === "dark");
  WIDE.addEventListener("change", arrange);
  ROOMY.addEventListener("change", arrange);
  arrange();
})();
