// Figures that move: drawn when they come into view, by the copy of plotly that lies beside the pages; no button sends anything.
(() => {
  const plots = [...document.querySelectorAll('.js-plot')];
  const draw = div => {
    const spec = JSON.parse(div.querySelector('script').textContent);
    const layout = Object.assign({}, spec.layout);
    Plotly.newPlot(div, spec.data, layout, {displaylogo: false, plotlyServerURL: '', modeBarButtons: [['toImage', 'zoom2d', 'pan2d', 'resetScale2d']]}).then(() => div.dataset.drawn = 'yes');
  };
  const seen = new IntersectionObserver(entries => entries.forEach(e => { if (e.isIntersecting) { seen.unobserve(e.target); draw(e.target); } }));
  plots.forEach(d => seen.observe(d));
})();
