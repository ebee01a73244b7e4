"use strict";
(async () => {
  const root = document.documentElement;
  const chosen = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => { root.dataset.theme = chosen.matches ? "dark" : "light"; };
  theme();

  const text = (id) => document.getElementById(id)?.textContent ?? "";
  const unpack = async (id) => {
    const bytes = Uint8Array.from(atob(text(id)), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };
  const COLOURS = ["#4c8dff", "#f0883e", "#3fb950", "#bc8cff", "#db61a2", "#d4a72c", "#39c5cf", "#ff7b72", "#8b949e",
    "#7ee787", "#a371f7", "#ffa657"];
  const FIXED = { engine_step: "#8b949e", forward: "#4c8dff" };
  const colourOf = new Map();
  const colour = (name) => {
    if (FIXED[name]) return FIXED[name];
    if (name.startsWith("worker_step")) return "#6e7681";
    if (!colourOf.has(name)) colourOf.set(name, COLOURS[1 + colourOf.size % (COLOURS.length - 1)]);
    return colourOf.get(name);
  };
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const ms = (ns) => (ns / 1e6).toFixed(3) + " ms";
  const layout = (more) => ({
    paper_bgcolor: css("--bg"), plot_bgcolor: css("--bg"), font: { color: css("--fg"), size: 12 },
    margin: { l: 150, r: 10, t: 10, b: 40 }, barmode: "overlay", bargap: 0.15, showlegend: false, ...more,
  });
  const axis = (more) => ({ gridcolor: css("--line"), zerolinecolor: css("--line"), automargin: true, ...more });
  const CONFIG = { displaylogo: false, responsive: true, scrollZoom: true,
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "toImage"]] };

  // The figures that Python has made: bars of time by rank, boxes by stage, bars by request.
  const figures = JSON.parse(text("figures"));
  const drawFigures = () => {
    for (const [id, figure] of Object.entries(figures)) {
      const traces = figure.traces.map((trace) => {
        const own = trace.colour ?? colour(trace.name);
        return { ...trace, marker: { color: own }, line: trace.type === "box" ? { color: own, width: 1.5 } : undefined };
      });
      Plotly.react(id, traces, layout({
        barmode: figure.stacked ? "stack" : "overlay", showlegend: Boolean(figure.stacked), height: figure.height,
        margin: { l: 150, r: 10, t: figure.stacked ? 40 : 10, b: 40 },
        legend: { orientation: "h", y: 1, yanchor: "bottom", traceorder: "normal" }, xaxis: axis({ title: { text: figure.x }, type: figure.log ? "log" : "linear" }),
        yaxis: axis({ autorange: "reversed", type: "category" }),
      }), { ...CONFIG, scrollZoom: false, displayModeBar: false });
    }
  };

  // The timeline: only what is at least about a pixel wide is a bar of its own.
  const MOST = 2500;
  const spans = text("columns") ? await unpack("columns") : null;
  const byRow = [];
  if (spans) {
    for (let i = 0; i < spans.start.length; i++) (byRow[spans.row[i]] ??= []).push(i);
    for (const row of byRow) row?.sort((a, b) => spans.start[a] - spans.start[b]);
  }
  const end = (i) => spans.start[i] + spans.took[i];
  let whole = [0, 1];
  if (spans) whole = [0, spans.start.reduce((most, start, i) => Math.max(most, start + spans.took[i]), 1)];

  const visible = (from, to) => {
    let pixel = (to - from) / 1200;
    for (;;) {
      const bars = [];
      byRow.forEach((row, y) => {
        let merged = null;
        for (const i of row ?? []) {
          if (end(i) < from || spans.start[i] > to) continue;
          if (spans.took[i] >= pixel) {
            bars.push({ y, start: spans.start[i], took: spans.took[i], i });
          } else if (merged && spans.start[i] - (merged.start + merged.took) < pixel) {
            merged.took = Math.max(merged.took, end(i) - merged.start); merged.count++; merged.busy += spans.took[i];
            if (spans.took[i] > spans.took[merged.i]) merged.i = i;
          } else {
            merged = { y, start: spans.start[i], took: spans.took[i], i, count: 1, busy: spans.took[i] };
            bars.push(merged);
          }
        }
      });
      if (bars.length <= MOST) return bars;
      pixel *= 2;
    }
  };
  let shown = [];
  const drawTimeline = (from, to) => {
    shown = visible(from, to);
    const many = (bar) => (bar.count ?? 1) > 1;
    const trace = {
      type: "bar", orientation: "h", hoverinfo: "text", textposition: "none",
      y: shown.map((bar) => bar.y), base: shown.map((bar) => bar.start / 1e6), x: shown.map((bar) => bar.took / 1e6),
      marker: { color: shown.map((bar) => colour(spans.names[spans.name[bar.i]])),
        opacity: shown.map((bar) => (many(bar) ? Math.max(0.25, Math.min(0.8, bar.busy / bar.took)) : 1)), line: { width: 0 } },
      hovertext: shown.map((bar) => many(bar) ? `${bar.count} short ones: zoom in`
        : `${spans.names[spans.name[bar.i]]}<br>${ms(bar.took)}`),
    };
    return Plotly.react("timeline", [trace], layout({
      height: Math.max(260, 60 + 24 * spans.rows.length), dragmode: "zoom", bargap: 0.1,
      xaxis: axis({ range: [from / 1e6, to / 1e6], title: { text: "ms" } }),
      yaxis: axis({ tickvals: spans.rows.map((_, y) => y), ticktext: spans.rows, range: [spans.rows.length - 0.5, -0.5],
        fixedrange: true }),
    }), CONFIG);
  };

  let details = null;
  const show = async (i) => {
    details ??= await unpack("details");
    const [trace, id, attributes, error] = details[i];
    const rows = [["start", ms(spans.start[i])], ["took", ms(spans.took[i])], ["error", error], ["trace", trace], ["span", id],
      ...Object.entries(attributes)].filter(([, value]) => value !== null && value !== "");
    const table = document.createElement("table");
    for (const [key, value] of rows) {
      const row = table.insertRow();
      row.insertCell().textContent = key;
      row.insertCell().textContent = Array.isArray(value) ? value.join(", ") : String(value);
    }
    const heading = document.createElement("b");
    heading.textContent = spans.names[spans.name[i]];
    document.getElementById("detail").replaceChildren(heading, table);
  };

  let range = whole;
  const zoom = (from, to) => { range = [Math.max(from, whole[0] - 1), to]; return drawTimeline(...range); };
  const draw = async () => {
    drawFigures();
    if (spans) await zoom(...range);
  };
  await draw();
  if (spans) {
    const chart = document.getElementById("timeline");
    chart.on("plotly_relayout", (change) => {
      if (change["xaxis.autorange"]) zoom(...whole);
      else if ("xaxis.range[0]" in change) zoom(change["xaxis.range[0]"] * 1e6, change["xaxis.range[1]"] * 1e6);
    });
    chart.on("plotly_click", ({ points: [point] }) => {
      const bar = shown[point.pointNumber];
      if ((bar.count ?? 1) > 1) zoom(bar.start - bar.took * 0.1, bar.start + bar.took * 1.1);
      else show(bar.i);
    });
    for (const row of document.querySelectorAll("tr[data-start]")) {
      row.addEventListener("click", () => {
        const start = Number(row.dataset.start), took = Number(row.dataset.took);
        zoom(start - took * 0.3, start + took * 1.3);
        const found = byRow.flat().find((i) => spans.start[i] === start && spans.took[i] === took);
        if (found !== undefined) show(found);
        chart.scrollIntoView({ block: "center" });
      });
    }
    document.getElementById("all").addEventListener("click", () => zoom(...whole));
  }
  const flip = () => { draw(); };
  chosen.addEventListener("change", () => { theme(); flip(); });
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    flip();
  });
  root.dataset.ready = String(Math.round(performance.now()));
})();
