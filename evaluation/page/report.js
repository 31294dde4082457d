"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  // Colours of Okabe and Ito, which people with any colour vision tell apart. Shapes repeat what the colours say.
  const COLOURS = { control: "#999999", observed: "#0072b2", predicted: "#d55e00" };
  const SYMBOLS = { control: "circle-open", observed: "circle", predicted: "diamond" };
  const KINDS = ["control", "observed", "predicted"];
  const NAMES = { control: "real control", observed: "real perturbed", predicted: "predicted" };
  const MISSING = 65535;
  const ROWS = 100;
  const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  // Plotly reads some markup in texts, so names are escaped.
  const plain = (name) => name.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (name, most) => (name.length > most ? name.slice(0, most - 1) + "…" : name);
  const number = (value) => (value === null || value === undefined ? "–" : Number.isInteger(value) ? String(value) : Number(value).toPrecision(4).replace(/\.?0+$/, ""));

  const element = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  };

  const options = (select, names, values) => {
    select.replaceChildren(...names.map((name, i) => {
      const made = element("option", short(name, 80));
      made.value = values ? values[i] : name;
      return made;
    }));
  };

  const layout = (x, y, more) => ({
    margin: { l: 60, r: 15, t: 15, b: 50 },
    font: { family: "system-ui, sans-serif", size: 12, color: "#1b1f24" },
    paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest",
    xaxis: { title: { text: x }, gridcolor: "#eaeef2", zerolinecolor: "#afb8c1", automargin: true },
    yaxis: { title: { text: y }, gridcolor: "#eaeef2", zerolinecolor: "#afb8c1", automargin: true },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
    ...more,
  });

  // The arrays behind the pictures of single groups. They are unpacked once.

  const TYPES = { int8: Int8Array, int16: Int16Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array };
  let buffer = null;

  const unpack = async () => {
    const text = by("pack").textContent;
    if (!text) return;
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    buffer = await new Response(stream).arrayBuffer();
    by("pack").remove();
  };

  const row = (place, group) => {
    const width = place.shape.slice(1).reduce((a, b) => a * b, 1);
    const Kind = TYPES[place.type];
    return new Kind(buffer, place.at + group * width * Kind.BYTES_PER_ELEMENT, width);
  };

  const changes = (kind, group) => {
    if (!data.changes[kind]) return null;
    const step = row(data.changes[kind].steps, group)[0];
    return Float64Array.from(row(data.changes[kind].values, group), (whole) => whole * step);
  };

  const tests = (group) => {
    const found = new Map();
    if (!data.tests) return found;
    const logs = row(data.tests.logs, group);
    row(data.tests.genes, group).forEach((gene, i) => { if (logs[i] !== MISSING) found.set(gene, logs[i] / 100); });
    return found;
  };

  // Tables, which a click on a column sorts, and so does the keyboard.

  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));

  class Table {
    /** columns: {name, value(row), number, show(row) or undefined}; rows: numbers that `value` takes. */
    constructor(table, columns, rows, most, changed) {
      Object.assign(this, { body: table.tBodies[0], columns, rows, most, changed, shown: most, by: null, down: false });
      const line = element("tr");
      this.heads = columns.map((column, i) => {
        const head = element("th", undefined, column.number ? "number" : "");
        head.scope = "col";
        const button = element("button", column.name);
        button.type = "button";
        button.addEventListener("click", () => this.sort(i));
        head.append(button);
        line.append(head);
        return head;
      });
      table.tHead.replaceChildren(line);
      this.draw();
    }

    sort(i) {
      // The first click sorts figures from the largest and names from A; the next one reverses the order.
      this.down = this.by === i ? !this.down : Boolean(this.columns[i].number);
      this.by = i;
      this.heads.forEach((head, j) => (j === i ? head.setAttribute("aria-sort", this.down ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
      this.order();
      this.draw();
    }

    order() {
      if (this.by === null) return;
      const { value } = this.columns[this.by];
      this.rows = this.rows.map((r) => [value(r), r]).sort(([a, r], [b, s]) => {
        // Rows without a figure stand last in both orders.
        const lacks = (a === null) - (b === null);
        return lacks || (a === null ? r - s : (this.down ? compare(b, a) : compare(a, b)) || r - s);
      }).map(([, r]) => r);
    }

    show(rows) {
      this.rows = rows;
      this.shown = this.most;
      this.order();
      this.draw();
    }

    more() {
      this.shown += 5 * this.most;
      this.draw();
    }

    draw() {
      this.body.replaceChildren(...this.rows.slice(0, this.shown).map((r) => {
        const line = element("tr");
        line.append(...this.columns.map((column) => {
          const cell = element("td", undefined, column.number ? "number" : "");
          const value = column.value(r);
          cell.append(column.show ? column.show(r) : column.number ? number(value) : value);
          return cell;
        }));
        return line;
      }));
      if (this.changed) this.changed(this);
    }
  }

  // The scores of each group

  const texts = data.table.texts;
  const text = (name, r) => texts[name].names[texts[name].codes[r]];
  const figures = data.table.numbers;
  const length = texts.method.codes.length;
  const groupOf = new Map(data.groups.context.codes.map((c, i) => [
    JSON.stringify([data.groups.context.names[c], data.groups.perturbation.names[data.groups.perturbation.codes[i]]]), i,
  ]));
  const groupOfRow = (r) => groupOf.get(JSON.stringify([text("context", r), text("perturbation", r)]));

  const drawScores = () => {
    const link = (r) => {
      const group = groupOfRow(r);
      if (group === undefined) return text("perturbation", r);
      const made = element("button", text("perturbation", r), "link");
      made.type = "button";
      made.addEventListener("click", () => { choose(group); by("one").scrollIntoView({ behavior: "smooth" }); });
      return made;
    };
    const columns = [
      { name: "context", value: (r) => text("context", r) },
      { name: "perturbation", value: (r) => text("perturbation", r), show: link },
      { name: "method", value: (r) => text("method", r) },
      ...Object.keys(figures).filter((name) => !name.startsWith(data.cell_eval) && figures[name].some((value) => value !== null))
        .map((name) => ({ name: name.replaceAll("_", " "), value: (r) => figures[name][r], number: true })),
      ...["seen", "reason"].filter((name) => texts[name].names.some((held) => held !== ""))
        .map((name) => ({ name: name === "seen" ? "seen in training" : name, value: (r) => text(name, r) })),
    ];
    const every = Array.from({ length }, (_, r) => r);
    const words = every.map((r) => ["context", "perturbation", "method", "seen", "reason"].map((name) => text(name, r)).join("\n").toLowerCase());
    const table = new Table(by("table"), columns, every, ROWS, (of) => {
      const shown = Math.min(of.shown, of.rows.length);
      by("found").textContent = `${of.rows.length} rows` + (shown < of.rows.length ? `, the first ${shown} are shown` : "");
      by("more").hidden = shown === of.rows.length;
    });
    const narrow = () => {
      const asked = by("search").value.toLowerCase().split(/\s+/).filter(Boolean);
      const method = by("method").value;
      table.show(every.filter((r) => (method === "" || String(texts.method.codes[r]) === method) && asked.every((word) => words[r].includes(word))));
    };
    texts.method.names.forEach((name, i) => {
      const option = element("option", name);
      option.value = i;
      by("method").append(option);
    });
    by("search").addEventListener("input", narrow);
    by("method").addEventListener("change", narrow);
    by("more").addEventListener("click", () => table.more());
  };

  const drawAverages = () => {
    const place = by("averages-pictures");
    if (!place) return;
    // All places are made first: the number of columns depends on them, and the width of a picture on that.
    const places = [];
    for (const metric of [...new Set(data.averages.map((row) => row.metric))]) {
      const rows = data.averages.filter((row) => row.metric === metric && row.value !== null).reverse();
      if (!rows.length) continue;
      const div = element("div", undefined, "picture");
      div.setAttribute("role", "img");
      div.setAttribute("aria-label", `Average ${metric} of each method`);
      place.append(div);
      places.push([metric, rows, div]);
    }
    for (const [metric, rows, div] of places) {
      const isModel = (row) => row.method === data.model;
      Plotly.newPlot(div, [{
        type: "scatter", mode: "markers", x: rows.map((row) => row.value), y: rows.map((_, i) => i), text: rows.map((row) => plain(row.method)),
        error_x: { type: "data", symmetric: false, thickness: 1.5, color: "#57606a", array: rows.map((row) => (row.high === null ? 0 : row.high - row.value)), arrayminus: rows.map((row) => (row.low === null ? 0 : row.value - row.low)) },
        marker: { size: 9, color: rows.map((row) => (isModel(row) ? COLOURS.predicted : COLOURS.observed)), symbol: rows.map((row) => (isModel(row) ? "diamond" : "circle")) },
        hovertemplate: "%{text}: %{x:.4f}<extra></extra>",
      }], layout(plain(metric), "", {
        showlegend: false,
        yaxis: { tickvals: rows.map((_, i) => i), ticktext: rows.map((row) => plain(short(row.method, 30))), automargin: true, gridcolor: "#eaeef2", zeroline: false },
      }), CONFIG);
    }
  };

  // One group

  const groups = data.groups;
  const contextOf = (g) => groups.context.names[groups.context.codes[g]];
  const perturbationOf = (g) => groups.perturbation.names[groups.perturbation.codes[g]];
  let chosen = 0;
  let top = null;

  const choose = (group) => {
    chosen = group;
    const context = groups.context.codes[group];
    by("context").value = context;
    const here = groups.context.codes.flatMap((c, g) => (c === context ? [g] : []));
    options(by("perturbation"), here.map(perturbationOf), here);
    by("perturbation").value = group;
    drawGroup();
    if (by("only") && by("only").checked) drawMap();
  };

  const MOST_GENES = 4000;
  const strongest = (x, y, most) => {
    const every = Array.from(x.keys());
    if (every.length <= most) return every;
    const size = (gene) => Math.max(Math.abs(x[gene]), y ? Math.abs(y[gene]) : 0);
    return every.sort((a, b) => size(b) - size(a)).slice(0, most);
  };

  const drawGroup = () => {
    if (!data.changes || !buffer || !groups.context.codes.length) return;
    const observed = changes("observed", chosen);
    const predicted = changes("predicted", chosen);
    const p = tests(chosen);
    const name = (gene) => plain(data.genes[gene]);
    const order = strongest(observed, predicted, data.genes.length);
    const correlation = text_of_scores();
    by("chosen").textContent = `${perturbationOf(chosen)} in ${contextOf(chosen)}${correlation}`;
    if (predicted) {
      const drawn = strongest(observed, predicted, MOST_GENES);
      const named = strongest(observed, null, data.genes.length).sort((a, b) => Math.abs(observed[b]) - Math.abs(observed[a])).slice(0, 8);
      const limit = 1.05 * Math.max(1e-6, ...drawn.map((gene) => Math.max(Math.abs(observed[gene]), Math.abs(predicted[gene]))));
      Plotly.react(by("changes"), [
        { type: "scatter", mode: "lines", x: [-limit, limit], y: [-limit, limit], line: { color: "#afb8c1", width: 1, dash: "dot" }, hoverinfo: "skip" },
        { type: "scatter", mode: "markers", x: drawn.map((gene) => observed[gene]), y: drawn.map((gene) => predicted[gene]), text: drawn.map(name), marker: { size: 6, color: COLOURS.observed, opacity: 0.6 }, hovertemplate: "<b>%{text}</b><br>observed %{x:.3f}<br>predicted %{y:.3f}<extra></extra>" },
        { type: "scatter", mode: "text", x: named.map((gene) => observed[gene]), y: named.map((gene) => predicted[gene]), text: named.map((gene) => plain(short(data.genes[gene], 14))), textposition: "top center", textfont: { size: 10 }, hoverinfo: "skip" },
      ], layout("observed mean change", "predicted mean change", { showlegend: false }), CONFIG);
    }
    if (by("volcano")) {
      const drawn = [...p.keys()];
      const kinds = [["not different", "#999999", "circle-open", (g) => p.get(g) < -Math.log10(0.05)], ["up", COLOURS.predicted, "triangle-up", (g) => p.get(g) >= -Math.log10(0.05) && observed[g] > 0], ["down", COLOURS.observed, "triangle-down", (g) => p.get(g) >= -Math.log10(0.05) && observed[g] <= 0]];
      Plotly.react(by("volcano"), kinds.map(([label, color, symbol, is]) => {
        const of = drawn.filter(is);
        return { type: "scatter", mode: "markers", name: label, x: of.map((gene) => observed[gene]), y: of.map((gene) => p.get(gene)), text: of.map(name), customdata: of.map((gene) => (predicted ? predicted[gene].toFixed(3) : "–")), marker: { size: 6, color, symbol, opacity: 0.7 }, hovertemplate: "<b>%{text}</b><br>observed %{x:.3f}<br>predicted %{customdata}<br>-log10 p %{y:.2f}<extra></extra>" };
      }), layout("observed mean change", "-log10 adjusted p-value", { annotations: drawn.length ? [] : [{ text: "too few cells of this group to test", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }] }), CONFIG);
      by("some-tests").textContent = data.tests.all ? "" : ` The ${row(data.tests.genes, chosen).length} genes with the smallest p-values are shown.`;
    }
    const rows = order.sort((a, b) => Math.abs(observed[b]) - Math.abs(observed[a])).slice(0, 20);
    const columns = [
      { name: "gene", value: (gene) => data.genes[gene] },
      { name: "observed change", value: (gene) => observed[gene], number: true },
      ...(predicted ? [{ name: "predicted change", value: (gene) => predicted[gene], number: true }] : []),
      ...(data.tests ? [{ name: "-log10 adjusted p", value: (gene) => p.get(gene) ?? null, number: true }] : []),
    ];
    top = new Table(by("top"), columns, rows, rows.length, null);
  };

  const rowsOfModel = new Map();
  for (let r = 0; r < length; r++) if (text("method", r) === data.model) rowsOfModel.set(groupOfRow(r), r);

  const text_of_scores = () => {
    const r = rowsOfModel.get(chosen);
    if (r === undefined) return "";
    const parts = data.table.metrics.map((metric) => `${metric} ${number(figures[metric][r])}`);
    const seen = text("seen", r);
    return `: ${parts.join(", ")}${seen ? `; seen in training: ${seen}` : ""}`;
  };

  // All groups

  const drawHeat = () => {
    const metric = by("heat-metric").value;
    const method = Number(by("heat-method").value);
    const { context, perturbation } = groups;
    const z = context.names.map(() => perturbation.names.map(() => null));
    for (let r = 0; r < length; r++) {
      const group = groupOfRow(r);
      if (texts.method.codes[r] === method && group !== undefined) z[context.codes[group]][perturbation.codes[group]] = figures[metric][r];
    }
    const signed = metric.startsWith("pearson");
    const ticks = (names, room) => {
      const every = Math.max(1, Math.ceil(names.length / Math.max(1, room)));
      const kept = names.map((_, i) => i).filter((i) => i % every === 0);
      return { tickvals: kept, ticktext: kept.map((i) => plain(short(names[i], 24))), gridcolor: "#fff", zeroline: false, automargin: true, tickfont: { size: 10 } };
    };
    const place = by("heat-picture");
    Plotly.react(place, [{
      type: "heatmap", z, x: perturbation.names.map((_, i) => i), y: context.names.map((_, i) => i),
      text: context.names.map((c) => perturbation.names.map((p) => `${plain(p)}<br>${plain(c)}`)),
      // Blue to orange with white at 0, or dark to light. Both can be read with any colour vision, and in grey.
      ...(signed ? { colorscale: [[0, "#2166ac"], [0.5, "#f7f7f7"], [1, "#b35806"]], zmin: -1, zmax: 1 } : { colorscale: "Cividis" }),
      xgap: perturbation.names.length > 60 ? 0 : 1, ygap: 1, hoverongaps: false,
      hovertemplate: `<b>%{text}</b><br>${plain(metric)} %{z:.4f}<extra></extra>`, colorbar: { thickness: 12, title: { text: plain(metric), side: "right" } },
    }], layout("", "", { plot_bgcolor: "#eaeef2", xaxis: { ...ticks(perturbation.names, place.clientWidth / 16), tickangle: -60 }, yaxis: ticks(context.names, place.clientHeight / 18) }), CONFIG);
    if (!place.dataset.listens) {
      place.dataset.listens = "true";
      place.on("plotly_click", ({ points: [point] }) => {
        const group = groupOf.get(JSON.stringify([context.names[point.y], perturbation.names[point.x]]));
        if (group !== undefined) { choose(group); by("one").scrollIntoView({ behavior: "smooth" }); }
      });
    }
  };

  const drawMap = () => {
    const { x, y, kind, group } = data.map;
    const only = by("only").checked;
    const label = (i) => `${plain(perturbationOf(group[i]))}<br>${plain(contextOf(group[i]))}`;
    Plotly.react(by("map"), KINDS.map((name, k) => {
      const of = kind.flatMap((held, i) => (held === k ? [i] : []));
      const faded = (i) => (only && group[i] !== chosen ? 0.05 : 0.65);
      return { type: "scatter", mode: "markers", name: NAMES[name], x: of.map((i) => x[i]), y: of.map((i) => y[i]), text: of.map(label), marker: { size: 5, color: COLOURS[name], symbol: SYMBOLS[name], opacity: of.map(faded), line: { width: name === "control" ? 1 : 0 } }, hovertemplate: "%{text}<extra>%{fullData.name}</extra>" };
    }), layout("UMAP 1", "UMAP 2", { xaxis: { title: { text: "UMAP 1" }, showticklabels: false, gridcolor: "#fff", zeroline: false }, yaxis: { title: { text: "UMAP 2" }, showticklabels: false, gridcolor: "#fff", zeroline: false } }), CONFIG);
  };

  const drawCurves = () => {
    const history = data.history;
    const name = by("curve").value;
    const of = (key, label, color, dash, symbol) => {
      const kept = (history[key] ?? []).flatMap((value, i) => (value === null ? [] : [i]));
      return { type: "scatter", mode: kept.length > 60 ? "lines" : "lines+markers", name: label, x: kept.map((i) => history.step[i]), y: kept.map((i) => history[key][i]), line: { color, dash }, marker: { symbol }, hovertemplate: "step %{x}: %{y:.4f}<extra></extra>" };
    };
    const traces = [of(name, "training", COLOURS.observed, "solid", "circle"), of(`eval_${name}`, "validation", COLOURS.predicted, "dash", "diamond")];
    Plotly.react(by("curves"), traces.filter((trace) => trace.x.length), layout("step", plain(name.replaceAll("_", " ")), { showlegend: true }), CONFIG);
  };

  const drawCalibration = () => {
    const { expected, found, labels, name, rank_correlation } = data.calibration;
    Plotly.newPlot(by("calibration"), [{ type: "scatter", mode: "markers", x: expected, y: found, text: name.map(plain), marker: { size: 7, color: COLOURS.observed, opacity: 0.7 }, hovertemplate: "%{text}<br>expected %{x:.4g}<br>found %{y:.4g}<extra></extra>" }], layout(labels[0], labels[1], { showlegend: false }), CONFIG);
    by("rank").textContent = rank_correlation === null
      ? "Too few different values for a rank correlation."
      : `Spearman's rank correlation of the two over ${name.length} groups is ${rank_correlation}: at 1 it is known beforehand which predictions are the better ones, at 0 it is not.`;
  };

  const curvesOf = () => {
    const names = new Set(Object.keys(data.history).filter((name) => !["step", "epoch"].includes(name)).map((name) => name.replace(/^eval_/, "")));
    const found = [...names].filter((name) => [name, `eval_${name}`].some((key) => (data.history[key] ?? []).filter((value) => value !== null).length > 1));
    const shown = found.length ? found : [...names];
    // The loss is what most people look for.
    return shown.sort((a, b) => (b === "loss") - (a === "loss"));
  };

  const start = async () => {
    drawScores();
    drawAverages();
    if (groups.context.codes.length) {
      options(by("context"), groups.context.names, groups.context.names.map((_, i) => i));
      by("context").addEventListener("change", () => choose(groups.context.codes.indexOf(Number(by("context").value))));
      by("perturbation").addEventListener("change", () => choose(Number(by("perturbation").value)));
      options(by("heat-metric"), data.table.metrics);
      options(by("heat-method"), texts.method.names, texts.method.names.map((_, i) => i));
      by("heat-method").value = Math.max(0, texts.method.names.indexOf(data.model));
      for (const id of ["heat-metric", "heat-method"]) by(id).addEventListener("change", drawHeat);
      drawHeat();
      await unpack();
      choose(0);
    }
    if (data.map) {
      drawMap();
      by("only").addEventListener("change", drawMap);
    }
    if (data.history) {
      options(by("curve"), curvesOf());
      by("curve").addEventListener("change", drawCurves);
      drawCurves();
    }
    if (data.calibration) drawCalibration();
    document.documentElement.dataset.ready = "true";
  };

  start();
})();
