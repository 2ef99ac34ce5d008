() => {
  // What runs in the browser: the theme, the scrubber, the dividing line, copying, and names for screen readers.
  const changes = { columns: new Set(), focused: null, clicked: null };
  const page = {
    ready() {
      document.body.dataset.ready = "";
    },
    toggleTheme() {
      const dark = document.body.classList.toggle("dark");
      localStorage.setItem("theme", dark ? "dark" : "light");
    },
    remember(link) {
      if (link) history.replaceState(null, "", location.pathname + link + location.hash);
    },
    copyLink(link) {
      page.copy(link ? location.origin + location.pathname + link : location.href, document.querySelector("#copy-link"));
    },
    copy(text, button) {
      const before = button.textContent;
      const done = (word) => {
        button.textContent = word;
        setTimeout(() => (button.textContent = before), 1500);
      };
      // Without https or on refusal there is no clipboard; a selected field can still be copied by hand.
      if (!navigator.clipboard) return done("Copy by hand");
      navigator.clipboard.writeText(text).then(() => done("Copied"), () => done("Copy by hand"));
    },
    // While another model's choices are under way, its column takes no input: a list that is open when its choices leave
    // breaks the page, and Draw would send what fits the model before. A click on Draw or a preset waits until then.
    changing(column) {
      const model = document.querySelector(`#column-${column} [aria-label="Model"]`);
      if (model.value === model.dataset.before) return;
      changes.columns.add(column);
      setTimeout(() => {
        if (!changes.columns.has(column)) return;
        const focused = document.activeElement;
        page.hold();
        if (!focused?.closest("[inert]")) return;
        focused.blur();
        changes.focused = focused;
      });
    },
    changed(column) {
      changes.columns.delete(column);
      setTimeout(() => {
        page.hold();
        if (changes.columns.size) return;
        const { focused, clicked } = changes;
        changes.focused = changes.clicked = null;
        if (clicked) clicked.click();
        else if (document.activeElement === document.body) focused?.focus();
      }, 100); // when Gradio has shown the new choices
    },
    hold() {
      for (const column of "abcd") {
        for (const row of document.querySelectorAll(`#column-${column} .fields`)) row.inert = changes.columns.has(column);
      }
      const classes = document.querySelector("#classes");
      if (classes) classes.inert = changes.columns.size > 0;
      document.querySelector("#draw")?.classList.toggle("held", changes.columns.size > 0);
    },
    // Shows a step of the run in all columns, and at the end the images themselves.
    scrub(film, share) {
      for (const strip of film.querySelectorAll(".film-column")) {
        const frames = [...strip.querySelectorAll(".frame")];
        const shown = Math.round(share * (frames.length - 1));
        const last = shown === frames.length - 1;
        frames.forEach((frame, index) => frame.setAttribute("aria-pressed", String(index === shown)));
        strip.querySelector("output").textContent = frames[shown].dataset.step;
        const sources = frames[shown].querySelectorAll("img");
        const result = document.querySelector(`#pictures-${strip.dataset.column} .result`);
        result.classList.toggle("past", !last);
        result.querySelectorAll(".cell img").forEach((image, index) => {
          image.dataset.final ??= image.src;
          image.src = last ? image.dataset.final : sources[index].src;
        });
      }
    },
  };
  window.demoPage = page;

  const kept = localStorage.getItem("theme");
  if (kept) document.body.classList.toggle("dark", kept === "dark");

  // Who has gone elsewhere by a click is not led back to a field that was held.
  document.addEventListener("pointerdown", () => (changes.focused = null), true);

  document.addEventListener("focusin", ({ target }) => {
    if (target.matches('[aria-label="Model"]')) target.dataset.before = target.value;
  });

  document.addEventListener("input", ({ target }) => {
    if (target.matches("#scrubber")) {
      const share = target.max > 0 ? target.value / target.max : 1;
      target.setAttribute("aria-valuetext", `${Math.round(100 * share)} % of the run`);
      page.scrub(target.closest(".film"), share);
    }
    if (target.matches("#slider")) target.closest(".divided").style.setProperty("--split", `${target.value}%`);
  });

  // A link is restored before anything is drawn, and two clicks in a row draw once.
  setTimeout(page.ready, 15000); // should the link's answer get lost
  let clicked = -Infinity;
  document.addEventListener(
    "click",
    (event) => {
      const button = event.target.closest("#draw, .preset");
      if (!button) return;
      if (changes.columns.size) {
        changes.clicked = button;
        return event.stopImmediatePropagation();
      }
      const restoring = new URLSearchParams(location.search).has("s") && !("ready" in document.body.dataset);
      if (restoring || event.timeStamp - clicked < 500) return event.stopImmediatePropagation();
      clicked = event.timeStamp;
    },
    true,
  );

  document.addEventListener("click", ({ target }) => {
    const frame = target.closest(".frame");
    if (frame) {
      const frames = frame.parentElement.querySelectorAll(".frame").length;
      const scrubber = document.querySelector("#scrubber");
      scrubber.value = frames > 1 ? Math.round((frame.dataset.frame / (frames - 1)) * scrubber.max) : scrubber.max;
      scrubber.dispatchEvent(new Event("input", { bubbles: true }));
    }
    if (target.closest("#draw, .preset")) {
      document.querySelectorAll(".result").forEach((result) => (result.dataset.status = "waiting"));
    }
    const copy = target.closest(".copy");
    if (copy) page.copy(copy.closest(".code").querySelector("code").textContent, copy);
  });

  // The page checks numbers when it draws, and says what is wrong; these bounds are for the arrows of the fields.
  const bounds = { "#images": [1, 12, 1], "#seed": [0, 2147483647, 1], "#height": [8, 1024, 8], "#width": [8, 1024, 8] };
  for (const [selector, [min, max, step]] of Object.entries(bounds)) {
    Object.assign(document.querySelector(`${selector} input`) ?? {}, { min, max, step });
  }

  // Gradio replaces the text inside; the region itself must stay to be announced.
  const names = { "#theme": "Switch between light and dark theme", "#dice": "New seed" };
  for (const [selector, name] of Object.entries(names)) {
    const button = document.querySelector(selector);
    button?.setAttribute("aria-label", name);
    button?.setAttribute("title", name);
  }
  const live = document.querySelector("#live");
  live?.setAttribute("role", "status");
  live?.setAttribute("aria-live", "polite");
}
