"use strict";
// Text and lines take the colour of the page around them, so that dark, light and paper need no second drawing.
const ink = "currentColor";
const axis = { labelColor: ink, titleColor: ink, tickColor: ink, domainColor: ink, gridColor: ink, gridOpacity: 0.1,
  domainOpacity: 0.4, tickOpacity: 0.4, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", labelOverlap: true, labelSeparation: 4 };
const config = {
  background: null, font: "system-ui, sans-serif", axis, view: { stroke: null },
  legend: { labelColor: ink, titleColor: ink, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", orient: "top" },
  title: { color: ink, fontSize: 13, fontWeight: "normal", anchor: "start" },
  text: { color: ink, fontSize: 12 }, rule: { color: ink }, header: { labelColor: ink, titleColor: ink },
};
const options = { mode: "vega-lite", renderer: "svg", config,
  actions: { export: true, source: false, compiled: false, editor: false } };
const charts = [...document.querySelectorAll("script[data-chart]")].map(async (script) => {
  const chart = document.getElementById(script.dataset.chart);
  try {
    await vegaEmbed(chart, JSON.parse(script.textContent), options);
  } catch (error) {
    chart.textContent = `This figure could not be drawn: ${error.message}`;
    throw error;
  }
});
Promise.all(charts).then(() => { window.chartsReady = performance.now(); });
