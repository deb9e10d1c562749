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
  let note = ""; // what is worth knowing of how the model serves, where nothing else is told
  let keeping = ""; // what is wrong with the keeping of conversations, in words

  brook.setKeeping = function (words) {
    keeping = words;
    if (byId("keeping")) byId("keeping").textContent = words;
  };
  let shown = { words: "", state: "idle" };

  brook.setBusy = function (busy) {
    if (busy && !brook.busy && !opening) tell({ conversation });
    brook.busy = busy;
    document.body.classList.toggle("brook-busy", busy);
  };

  // Who this tab is: a secret of the browser's own, by which the server knows its conversations, and the one shown.

  const secret = stored("brook-browser") || newSecret();
  let conversation = stored("brook-conversation", () => sessionStorage) || "";
  let opening = true;

  function newSecret() {
    const made = btoa(String.fromCharCode(...crypto.getRandomValues(new Uint8Array(24))));
    store("brook-browser", made.replace(/\+/g, "-").replace(/\//g, "_"));
    return stored("brook-browser") || made.replace(/\+/g, "-").replace(/\//g, "_");
  }

  let model = stored("brook-model", () => sessionStorage) || "";

  brook.tab = () => ({ browser: secret, conversation, model });

  brook.setConversation = function (id) {
    conversation = id;
    opening = false;
    store("brook-conversation", id, () => sessionStorage);
  };

  // What another tab or device did is shown when this one is looked at again; another tab of this browser tells at once.

  const others = "BroadcastChannel" in window ? new BroadcastChannel("brook") : null;
  const tell = (news) => others && others.postMessage(news);

  brook.onReturn = function (open) {
    const refresh = () => {
      if (brook.busy || document.hidden) return;
      opening = true;
      open();
    };
    opening = true;
    open();
    document.addEventListener("visibilitychange", refresh);
    window.addEventListener("focus", refresh);
    if (others) others.onmessage = ({ data }) => data.conversation === conversation && refresh();
  };

  // While a reply is written the server is heard every half second. Gradio notices a connection that breaks, and loads
  // the page again when the server is back; one that died without a word (a sleeping phone, a lost proxy) shows here.

  const LOOK_MS = 2000;
  const STALL_MS = 10000;
  let heard = Date.now();
  let looked = heard;
  let asking = false;
  brook.hear = () => (heard = Date.now());
  setInterval(() => {
    const now = Date.now();
    if (now - looked > 2 * LOOK_MS) heard = now; // this machine slept: let the stream speak first
    looked = now;
    if (!brook.busy || now - heard < STALL_MS || asking) return;
    asking = true;
    // The browser may try connections that are as dead: each gets a moment, then the next.
    fetch("healthz", { cache: "no-store", signal: AbortSignal.timeout(2 * LOOK_MS) })
      .then(() => location.reload())
      .catch(() => (asking = false));
  }, LOOK_MS);

  brook.setStatus = function (words, state) {
    shown = { words, state };
    const line = byId("status-line");
    if (!line) return;
    const text = words || (state === "idle" ? readiness || note : "");
    if (line.textContent !== text) line.textContent = text;
    // Readers of the screen hear how it begins and ends, not every token.
    line.setAttribute("aria-live", state === "reading" || state === "writing" ? "off" : "polite");
    line.dataset.state = words ? state : readiness ? "waiting" : "idle";
  };

  brook.mountStatus = function (root) {
    root.innerHTML =
      '<p id="keeping" role="status"></p><p id="status-line" role="status" data-state="idle"></p>';
    byId("keeping").textContent = keeping;
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

  // The header, with what the server says about the models: see ui/models.py
  brook.mountAbout = function (root, props, watch, trigger) {
    const models = brook.makeModelMenu((name) => trigger("choose", { name }));
    root.append(
      button("menu", "Conversations", () => toggle("sidebar")),
      models.root,
      brook.tree.root,
      button("theme", "Light or dark", () => {
        const dark = !document.body.classList.contains("dark");
        setTheme(dark);
        store("brook-theme", dark ? "dark" : "light");
      }),
      button("settings", "Settings", () => toggle("settings")),
    );
    const show = () => {
      const about = props.value || {};
      models.show(about);
      readiness = about.loading ? about.loading.words : about.failed ? about.problem : "";
      note = about.note || "";
      if (about.models) {
        model = about.model;
        store("brook-model", model, () => sessionStorage);
      }
      brook.tags = about.tags || brook.tags;
      brook.setStatus(shown.words, shown.state);
    };
    watch("value", show);
    show();
    trigger("look", {});
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
  brook.closeOnPhones = (name) => ROOMY.matches || close(name);

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
        const closesItself = ".editor, .renaming, .conversation-search, .feedback, dialog[open], :popover-open";
        if (event.target.closest(closesItself) || document.querySelector(":popover-open")) return;
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
