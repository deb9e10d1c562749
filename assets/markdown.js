// Markdown → DOM, block by block: while a reply grows, only its last block changes. HTML in the text stays text.
"use strict";

(function () {
  const brook = (window.brook = window.brook || {});
  const here = document.currentScript.src.replace(/[^/]*$/, "");

  // KaTeX is large and rarely needed: formulas show as written until it is there.
  let katexLoading = null;
  const waitingForKatex = new Set();
  function loadKatex() {
    if (katexLoading) return;
    const sheet = Object.assign(document.createElement("link"), {
      rel: "stylesheet",
      href: here + "vendor/katex/katex.min.css",
    });
    const script = Object.assign(document.createElement("script"), { src: here + "vendor/katex/katex.min.js" });
    katexLoading = new Promise((done) => (script.onload = done)).then(() => {
      for (const render of waitingForKatex) render();
      waitingForKatex.clear();
    });
    document.head.append(sheet, script);
  }
  const formulas = {
    renderToString(tex, options) {
      if (window.katex) return window.katex.renderToString(tex, { ...options, throwOnError: false, errorColor: "currentColor" });
      loadKatex();
      return `<span class="formula">${escape(tex)}</span>`;
    },
  };

  function escape(text) {
    return text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  }

  const icons = {
    copy: "M9 9h10v10H9zM5 15V5h10",
    check: "M5 12l5 5L20 7",
    edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
    retry: "M20 11a8 8 0 1 0-2.3 6.3M20 5v6h-6",
    resume: "M5 5l8 7-8 7zM17 5v14",
    undo: "M9 14L4 9l5-5M4 9h10a6 6 0 0 1 0 12h-3",
    close: "M6 6l12 12M18 6L6 18",
    down: "M12 5v14M6 13l6 6 6-6",
    chevron: "M9 6l6 6-6 6",
    menu: "M4 6h16M4 12h16M4 18h10",
    theme: "M12 4a8 8 0 1 0 8 8 6 6 0 0 1-8-8z",
    settings: "M4 7h10M18 7h2M4 17h2M10 17h10M14 5v4M6 15v4",
  };
  function icon(name) {
    return `<svg viewBox="0 0 24 24" aria-hidden="true"><path d="${icons[name]}"/></svg>`;
  }

  const md = window.markdownit({ html: false, linkify: true, breaks: true, typographer: false });
  md.use(window.texmath, { engine: formulas, delimiters: ["dollars", "brackets"], katexOptions: { trust: false } });
  md.renderer.rules.fence = md.renderer.rules.code_block = (tokens, i) => {
    const language = (tokens[i].info || "").trim().split(/\s+/)[0];
    const known = language && window.hljs.getLanguage(language);
    const code = tokens[i].content;
    const html = known ? window.hljs.highlight(code, { language, ignoreIllegals: true }).value : escape(code);
    return (
      `<div class="code" dir="ltr"><div class="code-head"><span>${escape(language)}</span>` +
      `<button type="button" class="copy-code" title="Copy code">${icon("copy")}</button></div>` +
      `<pre><code class="hljs">${html}</code></pre></div>`
    );
  };
  // A picture would be fetched from wherever the text says: it is shown as a link to follow or not.
  md.renderer.rules.image = (tokens, i) => {
    const source = escape(tokens[i].attrGet("src") || "");
    return `<a href="${source}" target="_blank" rel="noopener noreferrer nofollow">${escape(tokens[i].content || source)}</a>`;
  };
  md.renderer.rules.link_open = (tokens, i, options, env, self) => {
    tokens[i].attrSet("target", "_blank");
    tokens[i].attrSet("rel", "noopener noreferrer nofollow");
    return self.renderToken(tokens, i, options);
  };
  md.renderer.rules.table_open = () => '<div class="table"><table>';
  md.renderer.rules.table_close = () => "</table></div>";

  // Top-level blocks as lists of tokens.
  function blocks(tokens) {
    const found = [];
    let start = 0;
    tokens.forEach((token, i) => {
      if (token.level === 0 && token.nesting <= 0) {
        found.push(tokens.slice(start, i + 1));
        start = i + 1;
      }
    });
    return found;
  }

  // Shows growing markdown in `element`; blocks that read the same keep their nodes, and with them any selection.
  class MarkdownView {
    constructor(element) {
      this.element = element;
      this.text = null;
      this.shown = [];
      this.wantsKatex = () => this.show(this.text, true);
    }

    show(text, again = false) {
      if (text === this.text && !again) return;
      this.text = text;
      const env = {};
      const parts = blocks(md.parse(text, env));
      const lines = text.split("\n");
      parts.forEach((tokens, i) => {
        const map = tokens[0].map || [0, lines.length];
        const source = lines.slice(map[0], map[1]).join("\n");
        if (!again && this.shown[i] === source && i < parts.length - 1) return;
        const html = md.renderer.render(tokens, md.options, env);
        if (html.includes('class="formula"')) waitingForKatex.add(this.wantsKatex);
        let node = this.element.children[i];
        if (!node) {
          node = document.createElement("div");
          node.className = "block";
          node.dir = "auto";
          this.element.append(node);
        }
        if (node.brookHtml !== html) {
          node.innerHTML = node.brookHtml = html;
        }
        this.shown[i] = source;
      });
      while (this.element.children.length > parts.length) this.element.lastChild.remove();
      this.shown.length = parts.length;
    }
  }

  // Reasoning and answer apart: [{kind: "text" | "thought", text, open}]
  function split(text, tags, beginsInside) {
    const parts = [];
    let rest = text;
    if (beginsInside) {
      const ends = tags.map(([, close]) => [rest.indexOf(close), close]).filter(([at]) => at >= 0);
      const [at, close] = ends.sort((a, b) => a[0] - b[0])[0] || [-1, ""];
      parts.push({ kind: "thought", text: at < 0 ? rest : rest.slice(0, at), open: at < 0 });
      rest = at < 0 ? "" : rest.slice(at + close.length);
    }
    while (rest) {
      const starts = tags.map(([open, close]) => [rest.indexOf(open), open, close]).filter(([at]) => at >= 0);
      if (!starts.length) break;
      const [at, open, close] = starts.sort((a, b) => a[0] - b[0])[0];
      if (rest.slice(0, at).trim()) parts.push({ kind: "text", text: rest.slice(0, at) });
      const end = rest.indexOf(close, at + open.length);
      const inside = rest.slice(at + open.length, end < 0 ? rest.length : end);
      parts.push({ kind: "thought", text: inside, open: end < 0 });
      rest = end < 0 ? "" : rest.slice(end + close.length);
    }
    if (rest.trim() || !parts.length) parts.push({ kind: "text", text: rest });
    return parts.filter((part) => part.kind === "text" || part.open || part.text.trim());
  }

  // Shows a reply: folds for reasoning, markdown for all of it.
  class ReplyView {
    constructor(element) {
      this.element = element;
      this.views = [];
    }

    show(text, tags, beginsInside, writing) {
      const parts = split(text, tags, beginsInside);
      parts.forEach((part, i) => {
        let view = this.views[i];
        if (!view || view.kind !== part.kind) {
          view = part.kind === "thought" ? thoughtView() : textView();
          const old = this.element.children[i];
          if (old) old.replaceWith(view.root);
          else this.element.append(view.root);
          this.views[i] = view;
        }
        if (part.kind === "thought") {
          const thinking = part.open && writing;
          view.summary.textContent = thinking ? "Thinking…" : part.open ? "Thought, cut short" : "Thought";
          view.root.classList.toggle("thinking", Boolean(thinking));
          if (!view.touched) view.root.open = part.open;
        }
        view.markdown.show(part.text.trim() === "" ? "" : part.text);
      });
      while (this.element.children.length > parts.length) this.element.lastChild.remove();
      this.views.length = parts.length;
    }
  }

  function textView() {
    const root = document.createElement("div");
    return { kind: "text", root, markdown: new MarkdownView(root) };
  }

  function thoughtView() {
    const root = document.createElement("details");
    root.className = "thought";
    const summary = document.createElement("summary");
    const label = document.createElement("span");
    summary.innerHTML = icon("chevron");
    summary.append(label);
    const body = document.createElement("div");
    root.append(summary, body);
    const view = { kind: "thought", root, summary: label, markdown: new MarkdownView(body), touched: false };
    summary.addEventListener("click", () => (view.touched = true));
    return view;
  }

  async function copyText(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Pages that are not served over https have no clipboard; a selection can still be copied.
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    const before = button.innerHTML;
    button.innerHTML = icon("check");
    setTimeout(() => (button.innerHTML = before), 1200);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest && event.target.closest(".copy-code");
    if (button) copyText(button.closest(".code").querySelector("code").textContent, button);
  });

  Object.assign(brook, { ReplyView, copyText, icon });
})();
