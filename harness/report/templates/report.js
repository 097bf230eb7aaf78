"use strict";
(() => {
  const PAGE = 50;
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const data = read("data");
  const narrow = matchMedia("(max-width: 700px)");
  const state = { q: "", status: "", kind: "" };

  // Text only ever becomes a text node or an attribute that holds no address but a relative one made by the report.
  const make = (tag, props = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(props)) {
      if (key === "on") for (const [name, run] of Object.entries(value)) node.addEventListener(name, run);
      else if (value !== undefined && value !== false && value !== "") node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  };

  // ------------------------------------------------------------ figures
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const drawn = new Set();
  const wrapped = (name, width) => name.split(" ").reduce((lines, word) => {
    const last = lines.length - 1;
    if (last >= 0 && lines[last].length + word.length < width) lines[last] += ` ${word}`;
    else lines.push(word);
    return lines;
  }, []).join("<br>");
  const themed = (figure, named) => {
    const layout = structuredClone(figure.layout), grid = colour("--line"), ink = colour("--ink");
    const small = narrow.matches;
    for (const key of Object.keys(layout)) {
      if (!/^[xy]axis\d*$/.test(key)) continue;
      Object.assign(layout[key], { gridcolor: grid, linecolor: colour("--strong"), zerolinecolor: grid, automargin: true });
      if (layout[key].title) layout[key].title.font = { size: 12, color: colour("--soft") };
    }
    if (layout.meta && layout.meta.wide_labels) {
      layout.yaxis.tickfont = { size: small ? 9 : 11 };
      if (small) {
        const names = [...new Set(figure.data.flatMap((trace) => trace.y))];
        Object.assign(layout.yaxis, { tickvals: names, ticktext: names.map((name) => wrapped(name, 20)) });
      }
    }
    const longest = Math.max(...figure.data.map((trace) => (trace.name || "").length));
    const perLine = longest > 36 ? 1 : longest > 18 ? 2 : 4;
    const traces = figure.data.filter((trace) => trace.showlegend !== false).length;
    return Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
      font: { color: ink, size: 12, family: getComputedStyle(document.body).fontFamily },
      margin: { l: small ? 44 : 56, r: 12, t: 22, b: 44 }, dragmode: small ? false : "zoom",
      height: (layout.height || 330) + (traces > 1 || named ? 19 * Math.ceil(traces / (small ? 1 : perLine)) : 0), autosize: true,
      showlegend: traces > 1 || (named && !layout.meta), legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, xanchor: "left", font: { size: 11 } },
      hoverlabel: { namelength: -1 },
    });
  };
  const draw = (node, figure) => {
    drawn.add([node, figure]);
    node.style.minHeight = "0";
    Plotly.react(node, structuredClone(figure.data), themed(figure, Boolean(node.dataset.figure)),
      { responsive: true, displaylogo: false, displayModeBar: false });
  };
  const redraw = () => { for (const [node, figure] of drawn) if (node.isConnected) draw_again(node, figure); };
  const draw_again = (node, figure) => Plotly.react(node, structuredClone(figure.data), themed(figure, Boolean(node.dataset.figure)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  narrow.addEventListener("change", redraw);

  const lazily = new IntersectionObserver((seen) => {
    for (const entry of seen) if (entry.isIntersecting) {
      lazily.unobserve(entry.target);
      draw(entry.target, read(entry.target.dataset.figure));
    }
  }, { rootMargin: "300px" });
  for (const node of document.querySelectorAll(".plot[data-figure]")) lazily.observe(node);

  // A figure's points as rows: for who cannot see it, and to copy from. Names stand in it as plotly wants them, escaped.
  const unescaped = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
  const shown = (value) => [typeof value === "number" ? value.toLocaleString("en", { maximumSignificantDigits: 5 }) : unescaped(value || "–")];
  const points = ({ data, layout }) => {
    const title = (axis) => (layout[axis] && layout[axis].title && layout[axis].title.text) || "";
    const flat = data.some((trace) => trace.orientation === "h");
    const rows = data.flatMap((trace) => trace.x.map((x, i) => {
      const extra = trace.text ? `, ${trace.text[i]}` : "", measure = title((trace.yaxis || "y").replace("y", "yaxis"));
      const [at, value, what] = flat ? [trace.y[i], x, title("xaxis")] : [x, trace.y[i], measure];
      return [shown(trace.name + extra), shown(at), shown(what), shown(value)];
    }));
    return grid(["line", flat ? "case" : title("xaxis") || "at", "measure", "value"], rows);
  };
  for (const node of document.querySelectorAll("details.numbers")) {
    node.addEventListener("toggle", () => {
      if (node.open && node.childNodes.length < 2) node.append(points(read(node.parentNode.querySelector(".plot").dataset.figure)));
    });
  }

  // Print shows every figure, drawn or not.
  addEventListener("beforeprint", () => {
    for (const node of document.querySelectorAll(".plot[data-figure]:empty")) draw(node, read(node.dataset.figure));
  });

  // ------------------------------------------------------------ details
  const content = ([text, why, href]) => {
    const inner = make("bdi", text === "–" ? { class: "dash", title: why || "not measured", tabindex: "0" } : { title: why }, text);
    return href ? make("a", { href }, inner) : inner;
  };
  const facts = (rows) => make("dl", { class: "facts" }, ...rows.map(([name, ...cell]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, content(cell)))));
  const grid = (head, rows) => make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "table" },
    make("table", { class: "plain" },
      make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, content(cell))))))));
  const section = (part) => {
    const body = make("div", { class: "body" });
    const fill = () => {
      if (body.childNodes.length) return;
      if (part.f) body.append(facts(part.f));
      if (part.r) body.append(grid(part.h, part.r));
      if (part.x) {
        const text = make("pre", { tabindex: "0" }, part.x);
        body.append(text);
        if (part.e) requestAnimationFrame(() => { text.scrollTop = text.scrollHeight; });
      }
      if (part.p) {
        const node = make("div", { class: "plot", role: "img", "aria-label": part.t });
        body.append(node);
        requestAnimationFrame(() => draw(node, part.p));
      }
      if (part.n) body.append(make("p", { class: "quiet" }, part.n));
    };
    const node = make("details", { open: Boolean(part.o), on: { toggle: () => node.open && fill() } },
      make("summary", {}, part.t), body);
    return node;
  };
  const detail = (index) => {
    const { head, sections } = read(`detail-${index}`);
    const lost = head.left_out.length ? `Left out to keep this page small: ${head.left_out.join(", ")}. All of it is in the record.` : "";
    return make("div", { class: "inside" },
      make("p", { class: "id" }, make("code", {}, head.id), ` ${head.num}`),
      make("p", { class: "links" }, ...head.links.map(([text, href]) => make("a", { href }, text))),
      lost ? make("p", { class: "quiet" }, lost) : null, ...sections.map(section));
  };

  // ------------------------------------------------------------ tables
  const order = (column, down) => (a, b) => {
    const x = a.c[column][1], y = b.c[column][1];
    const empty = (v) => v === null || v === undefined;
    if (empty(x) || empty(y)) return empty(x) - empty(y);
    const side = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return down ? -side : side;
  };

  class CaseTable {
    constructor(spec, place) {
      Object.assign(this, { spec, page: 0, column: null, down: false, rows: spec.rows, opened: new Set() });
      this.title = make("span", { class: "n" });
      this.body = make("tbody");
      this.pager = make("div", { class: "pager" });
      this.heads = spec.head.map(([name, hint, numeric], i) => make("th", { scope: "col", class: numeric ? "num" : "", title: hint },
        make("button", { type: "button", on: { click: () => this.sort(i) } }, name)));
      const pick = make("select", { on: { change: (e) => e.target.value !== "" && this.sort(Number(e.target.value)) } },
        make("option", { value: "" }, "plan order"), ...spec.head.map(([name], i) => make("option", { value: String(i) }, this.full(i))));
      this.root = make("div", { class: "cases" }, make("h3", {}, `${spec.title} `, this.title),
        make("label", { class: "sorter" }, "Sort by ", pick),
        make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...this.heads)), this.body)), this.pager);
      place.append(this.root);
    }
    // A heading such as "p95" belongs to the latest heading that names its quantity.
    full(i) {
      const [name] = this.spec.head[i];
      if (!/^p\d+$/.test(name)) return name;
      for (let at = i - 1; at >= 0; at--) {
        const match = /^(.*) p50$/.exec(this.spec.head[at][0]);
        if (match) return `${match[1]} ${name}`;
      }
      return name;
    }
    sort(i) {
      this.down = this.column === i ? !this.down : Boolean(this.spec.head[i][2]);
      this.column = i;
      this.page = 0;
      this.heads.forEach((head, at) => at === i ? head.setAttribute("aria-sort", this.down ? "descending" : "ascending")
        : head.removeAttribute("aria-sort"));
      this.show();
    }
    filter(words) {
      const visible = (row) => words.every((word) => row.q.includes(word))
        && (!state.status || !row.s || row.s === state.status);
      this.rows = !state.kind || state.kind === this.spec.kind ? this.spec.rows.filter(visible) : [];
      this.page = 0;
      this.show();
      return this.rows.length;
    }
    show() {
      const rows = this.column === null ? this.rows : [...this.rows].sort(order(this.column, this.down));
      const pages = Math.max(1, Math.ceil(rows.length / PAGE));
      this.page = Math.min(this.page, pages - 1);
      this.sorted = rows;
      this.body.replaceChildren(...rows.slice(this.page * PAGE, (this.page + 1) * PAGE).flatMap((row) => this.line(row)));
      this.title.textContent = rows.length === this.spec.rows.length ? String(rows.length) : `${rows.length} of ${this.spec.rows.length}`;
      this.root.hidden = rows.length === 0;
      const turn = (by, name) => make("button", { class: "tool", type: "button", disabled: this.page + by < 0 || this.page + by >= pages,
        on: { click: () => { this.page += by; this.show(); this.root.scrollIntoView(); } } }, name);
      this.pager.replaceChildren(...(pages > 1 ? [turn(-1, "Previous"), `page ${this.page + 1} of ${pages}`, turn(1, "Next")] : []));
    }
    line(row) {
      const last = this.spec.head.length - 1;
      const cells = row.c.map(([text, sort, why], i) => {
        const numeric = this.spec.head[i][2], empty = text === "–";
        const kinds = [numeric ? "num" : "", empty ? "empty" : "", !row.s && i === last ? `wide tone-${row.tone}` : "", row.s && i === 1 ? "verdict" : ""];
        const cell = make("td", { class: kinds.filter(Boolean).join(" "), "data-label": this.full(i), title: why });
        if (i === 0) cell.append(...this.name(row, text));
        else if (i === 1 && row.s) cell.append(make("span", { class: `status ${row.s}` }, text),
          make("bdi", { class: `said tone-${row.tone}` }, row.v),
          row.n ? make("span", { class: "said tone-none" }, row.n) : "");
        else cell.append(empty ? make("span", { class: "dash" }, text) : make("bdi", {}, text));
        return cell;
      });
      const line = make("tr", { class: "row", id: row.s ? `case-${row.i}` : "" }, ...cells);
      return row.s && this.opened.has(row.i) ? [line, this.inside(row)] : [line];
    }
    name(row, text) {
      const apart = row.apart ? make("span", { class: "apart" }, row.apart) : null;
      if (!row.s) return [text];
      const open = this.opened.has(row.i);
      return [make("button", { class: "opener", type: "button", "aria-expanded": String(open),
        on: { click: (e) => this.toggle(row, e.currentTarget) } }, text), apart].filter(Boolean);
    }
    inside(row) {
      return make("tr", { class: "detail" }, make("td", { colspan: String(this.spec.head.length) }, detail(row.i)));
    }
    toggle(row, button) {
      const line = button.closest("tr"), open = !this.opened.has(row.i);
      this.opened[open ? "add" : "delete"](row.i);
      button.setAttribute("aria-expanded", String(open));
      if (open) line.after(this.inside(row));
      else line.nextElementSibling.remove();
    }
    reveal(index) {
      const at = this.sorted.findIndex((row) => row.i === index);
      if (at < 0) return false;
      this.page = Math.floor(at / PAGE);
      this.opened.add(index);
      this.show();
      const line = document.getElementById(`case-${index}`);
      line.scrollIntoView();
      line.querySelector("button").focus({ preventScroll: true });
      return true;
    }
  }

  const tables = data.tables.map((spec) => new CaseTable(spec, document.getElementById("tables")));
  for (const spec of data.compared) {
    const place = document.getElementById("compared");
    place.append(make("h2", {}, "Comparison"));
    new CaseTable(spec, place).show();
    for (const [name, ids] of spec.only) if (ids.length) {
      place.append(make("details", { class: "only" }, make("summary", {}, `Only in ${name}: ${ids.length}`),
        make("ul", {}, ...ids.map((id) => make("li", {}, make("code", {}, id))))));
    }
  }

  // ------------------------------------------------------------ filters
  const total = tables.reduce((sum, table) => sum + table.spec.rows.length, 0);
  const apply = () => {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = tables.reduce((sum, table) => sum + table.filter(words), 0);
    document.getElementById("shown").textContent = shown === total ? `${total} ${total === 1 ? "case" : "cases"}` : `${shown} of ${total} cases`;
  };
  for (const key of Object.keys(state)) {
    document.getElementById(key).addEventListener("input", (e) => { state[key] = e.target.value; apply(); });
  }
  document.querySelector(".filters").addEventListener("submit", (e) => e.preventDefault());
  const go = () => {
    const match = /^#case-(\d+)$/.exec(location.hash);
    if (!match) return;
    for (const key of Object.keys(state)) document.getElementById(key).value = state[key] = "";
    apply();
    tables.some((table) => table.reveal(Number(match[1])));
  };
  document.addEventListener("click", (e) => {
    const link = e.target.closest && e.target.closest('a[href^="#case-"]');
    if (link && link.getAttribute("href") === location.hash) go();
  });
  addEventListener("hashchange", go);
  apply();
  go();
})();
