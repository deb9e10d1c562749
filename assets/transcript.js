// The transcript: messages, what can be done with them, and scrolling that stays with the text.
"use strict";

(function () {
  const brook = window.brook;
  const rows = new Map(); // message id → its row, so that a message keeps its nodes when it moves
  let send = () => {};

  const ACTIONS = {
    copy: "Copy",
    edit: "Edit",
    retry: "Regenerate",
    resume: "Continue",
    undo: "Undo this exchange",
    good: "Good reply",
    bad: "Bad reply",
  };

  class Row {
    constructor(message) {
      this.role = message.role;
      this.root = element("div", `message-row ${message.role === "user" ? "user" : "bot"}-row`);
      this.bubble = element("div", `message ${message.role === "user" ? "user" : "bot"}`);
      this.bubble.dataset.testid = message.role === "user" ? "user" : "bot";
      this.body = element("div", "body");
      this.notice = element("div", "notice");
      this.actions = element("div", "actions");
      this.siblings = [];
      this.bubble.append(this.body);
      this.root.append(this.bubble, this.notice, this.actions);
      if (message.role === "user") this.body.dir = "auto";
      else this.reply = new brook.ReplyView(this.body);
    }

    show(message, { writing = false, waiting = false, last = false } = {}) {
      this.message = message;
      if (this.editor) return;
      if (this.reply) this.reply.show(message.text, brook.tags, message.reasoning, writing);
      else if (this.body.textContent !== message.text) this.body.textContent = message.text;
      this.root.classList.toggle("writing", writing);
      this.root.classList.toggle("waiting", waiting && !message.text);
      this.root.classList.toggle("empty", !writing && !waiting && !message.text);
      // What streams says nothing of its alternatives: they stay as they were.
      if (message.siblings.length) this.siblings = message.siblings;
      const names = ["copy", "edit"];
      if (this.reply && last) names.push("retry", ...(message.resumable ? ["resume"] : []), "undo");
      if (this.reply) names.push("good", "bad");
      this.offer(names);
      brook.showRating(this);
      this.tell(message, last);
    }

    offer(names) {
      const key = names.join() + this.siblings;
      if (this.offered === key) return;
      this.offered = key;
      this.actions.replaceChildren(
        ...brook.makeBranchSwitch(this.siblings, this.message.id, (id) => send("branch", { id })),
        ...names.map((name) => {
          const button = element("button", `action ${name}`);
          button.type = "button";
          button.title = ACTIONS[name];
          button.setAttribute("aria-label", ACTIONS[name]);
          button.innerHTML = brook.icon(name);
          button.addEventListener("click", () => this.act(name, button));
          return button;
        }),
      );
    }

    act(name, button) {
      if (name === "copy") brook.copyText(this.message.text, button);
      else if (name === "edit") this.edit();
      else if (name === "good" || name === "bad") brook.rate(this, name, (rating) => send("rate", rating));
      else send(name, { id: this.message.id });
    }

    // What went wrong, or why the reply stands as it does, and the way on.
    tell({ notice, failed, resumable }, last) {
      const way = failed ? "retry" : last && resumable ? "resume" : "";
      const key = notice && `${notice} ${way}`;
      if (this.told === key) return;
      this.told = key;
      this.notice.replaceChildren();
      this.notice.classList.toggle("failed", failed);
      if (!notice) return;
      const words = element("span", "");
      words.textContent = notice;
      this.notice.append(words);
      if (!way) return;
      const go = element("button", `${way}-notice`);
      go.type = "button";
      go.textContent = failed ? "Retry" : ACTIONS[way];
      go.addEventListener("click", () => send(way, { id: this.message.id }));
      this.notice.append(go);
    }

    edit() {
      if (this.editor) return;
      const area = element("textarea", "editor");
      area.value = this.message.text;
      area.dir = "auto";
      area.setAttribute("aria-label", "Edit message");
      const bar = element("div", "editor-bar");
      const cancel = element("button", "cancel");
      const save = element("button", "save");
      cancel.type = save.type = "button";
      cancel.textContent = "Cancel";
      save.textContent = this.reply ? "Save" : "Send";
      bar.append(cancel, save);
      this.editor = element("div", "editing");
      this.editor.append(area, bar);
      this.bubble.hidden = this.actions.hidden = true;
      this.root.prepend(this.editor);
      this.root.classList.add("is-editing");
      const grow = () => {
        area.style.height = "auto";
        area.style.height = `${Math.min(area.scrollHeight + 2, window.innerHeight * 0.6)}px`;
      };
      area.addEventListener("input", grow);
      grow();
      area.focus();
      const finish = () => {
        this.editor.remove();
        this.editor = null;
        this.bubble.hidden = this.actions.hidden = false;
        this.root.classList.remove("is-editing");
      };
      const submit = () => {
        const text = area.value;
        if (!text.trim()) return;
        finish();
        if (text !== this.message.text || !this.reply) send("edit", { id: this.message.id, text });
      };
      cancel.addEventListener("click", finish);
      save.addEventListener("click", submit);
      area.addEventListener("keydown", (event) => {
        if (event.key === "Escape") {
          event.stopPropagation();
          finish();
        } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && (!this.reply || event.ctrlKey)) {
          event.preventDefault();
          submit();
        }
      });
    }
  }

  function element(name, className) {
    const node = document.createElement(name);
    node.className = className;
    return node;
  }

  function rowOf(message) {
    let row = rows.get(message.id);
    if (!row || row.role !== message.role) {
      row = new Row(message);
      rows.set(message.id, row);
    }
    return row;
  }

  // Scrolling follows the text until someone scrolls up, and again once they are back at the end.
  const scroll = {
    pinned: true,
    box: () => document.getElementById("chatbot"),
    follow() {
      const box = this.box();
      if (box && this.pinned) box.scrollTop = box.scrollHeight;
    },
    pin() {
      this.pinned = true;
      this.follow();
      this.mark();
    },
    mark() {
      document.body.classList.toggle("reading-above", !this.pinned);
    },
    watch() {
      const box = this.box();
      if (!box || box.brookWatched) return;
      box.brookWatched = true;
      box.setAttribute("role", "log");
      box.setAttribute("aria-label", "Conversation");
      box.tabIndex = 0;
      let last = 0;
      box.addEventListener("scroll", () => {
        const below = box.scrollHeight - box.scrollTop - box.clientHeight;
        if (below < 48) this.pinned = true;
        else if (box.scrollTop < last) this.pinned = false;
        last = box.scrollTop;
        this.mark();
      });
      const down = element("button", "to-end");
      down.type = "button";
      down.title = "To the latest";
      down.setAttribute("aria-label", "To the latest");
      down.innerHTML = brook.icon("down");
      down.addEventListener("click", () => this.pin());
      document.getElementById("dock").prepend(down);
      new ResizeObserver(() => this.follow()).observe(box);
    },
  };

  const page = { past: { messages: [], conversation: null, tree: [] }, live: { state: "idle", status: "", message: null } };

  function isEmpty() {
    return !page.past.messages.length && !page.live.message;
  }

  brook.mountPast = function (root, props, watch, trigger, examples) {
    send = (name, data = {}) => {
      if (brook.busy && name !== "stop") return;
      trigger(name, data);
    };
    root.classList.add("past");
    const welcome = element("div", "welcome");
    const title = element("h1", "");
    title.textContent = "What shall we talk about?";
    const choices = element("div", "examples");
    for (const text of examples) {
      const button = element("button", "example");
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => send("example", { text }));
      choices.append(button);
    }
    welcome.append(title, choices);
    const list = element("div", "rows");
    brook.tree.connect(
      (id) => send("branch", { id }),
      () => page.live.message,
    );
    root.replaceChildren(welcome, list);
    const show = () => {
      const past = (page.past = props.value || page.past);
      if (past.conversation !== null) brook.setConversation(past.conversation);
      const before = list.dataset.conversation;
      const wanted = past.messages.map((message) => {
        const row = rowOf(message);
        row.show(message);
        return row.root;
      });
      list.replaceChildren(...wanted);
      brook.tree.show(past.tree);
      list.dataset.conversation = past.conversation || "";
      const kept = new Set(past.messages.map((m) => m.id));
      if (page.live.message) kept.add(page.live.message.id);
      for (const id of rows.keys()) if (!kept.has(id)) rows.delete(id);
      document.body.classList.toggle("brook-empty", isEmpty());
      scroll.watch();
      if (before !== list.dataset.conversation || brook.busy) scroll.pin();
      else scroll.follow();
    };
    watch("value", show);
    show();
    brook.onReturn(() => trigger("open", {}));
  };

  brook.mountLive = function (root, props, watch, trigger) {
    root.classList.add("live");
    let scheduled = false;
    const paint = () => {
      scheduled = false;
      const { message, state } = page.live;
      const writing = state === "writing";
      const waiting = state === "waiting" || state === "reading";
      if (message) {
        const row = rowOf(message);
        if (root.firstChild !== row.root || root.childNodes.length > 1) root.replaceChildren(row.root);
        row.show(message, { writing, waiting, last: true });
      } else root.replaceChildren();
      document.body.classList.toggle("brook-empty", isEmpty());
      scroll.follow();
    };
    const show = () => {
      page.live = props.value || page.live;
      brook.hear();
      brook.setBusy(["waiting", "reading", "writing"].includes(page.live.state));
      brook.setStatus(page.live.status, page.live.state);
      // However many frames arrive, one is painted a screen refresh; a hidden page has no refreshes.
      if (scheduled) return;
      scheduled = true;
      if (document.hidden) setTimeout(paint, 0);
      else requestAnimationFrame(paint);
    };
    watch("value", show);
    show();
  };
})();
