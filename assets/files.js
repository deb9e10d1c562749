// Out and in: conversations as files, and the one that is shown as a page of its own.
"use strict";

(function () {
  const brook = (window.brook = window.brook || {});
  const element = (name, className) => Object.assign(document.createElement(name), { className });

  const FORMATS = [
    ["json", "JSON", "Everything, to import again"],
    ["markdown", "Markdown", "To read and edit"],
    ["openai", "JSONL, OpenAI’s messages", "For fine-tuning"],
    ["sharegpt", "JSONL, ShareGPT", "For fine-tuning"],
    ["html", "Web page", "One file that looks like this page"],
    ["feedback", "JSONL, feedback", "Rated replies with their notes"],
  ];

  // props.value: {n, file: {name, type, text}} or {n, words, failed}
  brook.mountFiles = function (root, props, watch, trigger) {
    const opener = element("button", "files-opener");
    opener.type = "button";
    opener.textContent = "Export and import";
    opener.setAttribute("aria-haspopup", "dialog");
    const panel = element("dialog", "files");
    panel.setAttribute("aria-label", "Export and import");
    const head = element("div", "files-head");
    const title = element("h2", "");
    title.textContent = "Export";
    const close = element("button", "icon");
    close.type = "button";
    close.setAttribute("aria-label", "Close");
    close.innerHTML = brook.icon("close");
    close.addEventListener("click", () => panel.close());
    head.append(title, close);

    const scope = element("div", "files-scope");
    scope.setAttribute("role", "radiogroup");
    scope.setAttribute("aria-label", "What to export");
    const scopes = ["This chat", "All chats"].map((words, i) => {
      const label = element("label", "");
      const radio = Object.assign(element("input", ""), { type: "radio", name: "files-scope", value: String(i) });
      radio.addEventListener("change", offer);
      label.append(radio, words);
      scope.append(label);
      return radio;
    });
    const list = element("div", "files-list");
    const importTitle = element("h2", "");
    importTitle.textContent = "Import";
    const choose = element("label", "files-choose");
    const field = element("input", "");
    field.type = "file";
    field.accept = ".json,.jsonl,.md,.markdown,.txt";
    const what = element("span", "");
    what.textContent = "Choose a file";
    const which = element("small", "");
    which.textContent = "What is exported here, but web pages and feedback; ChatGPT’s conversations.json; Open WebUI’s chats";
    choose.append(field, what, which);
    const said = element("p", "files-said");
    said.setAttribute("role", "status");
    panel.append(head, scope, list, importTitle, choose, said);
    root.replaceChildren(opener);
    document.body.append(panel);

    let chosen = "";
    function offer() {
      const all = scopes[1].checked;
      const shown = brook.tab().conversation;
      list.replaceChildren(
        ...FORMATS.filter(([form]) => form !== "html" || (!all && chosen === shown)).map(([form, name, words]) => {
          const button = element("button", "files-format");
          button.type = "button";
          button.dataset.form = form;
          const label = element("span", "");
          label.textContent = name;
          const note = element("small", "");
          note.textContent = words;
          button.append(label, note);
          button.addEventListener("click", () => {
            if (form === "html") brook.saveSnapshot();
            else trigger("export", { id: all ? "" : chosen, form });
          });
          return button;
        }),
      );
    }

    // Opens for a conversation; for the one that is shown, or for all, where none is named.
    brook.openFiles = function (id = brook.tab().conversation) {
      chosen = id;
      scopes[0].disabled = !id;
      scopes[id ? 0 : 1].checked = true;
      said.textContent = "";
      offer();
      brook.closeOnPhones("sidebar");
      panel.showModal();
    };
    opener.addEventListener("click", () => brook.openFiles());
    panel.addEventListener("click", (event) => {
      if (event.target === panel) panel.close(); // beside it
    });
    field.addEventListener("change", async () => {
      const [file] = field.files;
      if (!file) return;
      said.classList.remove("failed");
      said.textContent = `Reading ${file.name}…`;
      const text = await file.text();
      field.value = "";
      trigger("import", { text });
    });

    let seen = 0;
    watch("value", () => {
      const { n = 0, file, words = "", failed = false } = props.value || {};
      if (n === seen) return;
      seen = n;
      if (file) brook.saveFile(file);
      said.textContent = words;
      said.classList.toggle("failed", failed);
    });
  };

  brook.saveFile = function ({ name, type, text }) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  // The conversation as it is shown, in one file without a script: what is drawn already, and the sheets it is drawn by.
  brook.saveSnapshot = async function () {
    const name = document.querySelector(".conversation.active .title");
    const title = name ? name.textContent : "Conversation";
    const sheets = ["transcript.css", "markdown.css"].map((sheet) =>
      [...document.styleSheets].find((one) => one.href && one.href.includes(`/${sheet}`)),
    );
    const css = sheets.flatMap((sheet) => [...sheet.cssRules].map((rule) => rule.cssText)).join("\n");
    const look = getComputedStyle(document.body);
    const names = new Set([...css.matchAll(/var\((--[\w-]+)/g)].map((match) => match[1]));
    const values = [...names].map((variable) => `${variable}: ${look.getPropertyValue(variable)};`).join("\n");

    const page = document.implementation.createHTMLDocument(title);
    const policy = page.createElement("meta");
    policy.httpEquiv = "Content-Security-Policy";
    policy.content = "default-src 'none'; style-src 'unsafe-inline'";
    const charset = page.createElement("meta");
    charset.setAttribute("charset", "utf-8");
    const viewport = page.createElement("meta");
    viewport.name = "viewport";
    viewport.content = "width=device-width, initial-scale=1";
    const style = page.createElement("style");
    style.textContent = `
      :root { color-scheme: ${document.body.classList.contains("dark") ? "dark" : "light"}; ${values} }
      body { margin: 0; background: ${look.backgroundColor}; color: ${look.color}; font-family: ${look.fontFamily}; }
      * { box-sizing: border-box; }
      p { margin: 0; }
      ${css}
      #chatbot { overflow: visible; max-width: var(--brook-column, 46rem); margin: 0 auto; padding: 2rem 1rem; }
      #chatbot .message-row { content-visibility: visible; }
      #chatbot .user-row { margin-bottom: 0.5rem; }
    `;
    page.head.prepend(charset, policy, viewport);
    page.head.append(style);
    const main = page.createElement("main");
    main.id = "chatbot";
    for (const row of document.querySelectorAll("#chatbot .message-row")) {
      const copy = page.importNode(row, true);
      for (const node of copy.querySelectorAll("button, textarea, .actions, .editing, .feedback, .katex-html, annotation"))
        node.remove();
      for (const hidden of copy.querySelectorAll("[hidden]")) hidden.hidden = false;
      main.append(copy);
    }
    if (document.body.classList.contains("dark")) page.body.className = "dark";
    page.body.append(main);
    const file = title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "") || "conversation";
    brook.saveFile({
      name: `${file}.html`,
      type: "text/html",
      text: `<!doctype html>\n${page.documentElement.outerHTML}\n`,
    });
  };
})();
