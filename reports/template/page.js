(() => {
'use strict';
const dark = matchMedia('(prefers-color-scheme: dark)');
const all = (q, el = document) => [...el.querySelectorAll(q)];
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/* ---- plotly figures: drawn to the column's width, in the page's colours ---- */
const plots = all('.js-plot');
let printing = false;
const widthOf = div => {
  let el = div.parentElement;
  while (el && !el.clientWidth) el = el.parentElement;            // inside something folded: take the room around it
  const room = printing ? 660 : (el ? el.clientWidth : 600);
  return Math.max(room, printing ? 0 : +(div.dataset.min || 0));
};
const heightOf = (layout, width) => {                              // pictures keep their shape, curves their height
  const tall = layout.meta && layout.meta.tall;
  return tall ? Math.min(tall[0] + tall[1] * width, 900) : layout.height || 440;
};
const theme = layout => {
  const light = printing || !dark.matches;
  const ink = light ? '#1b2733' : '#e4e9ee', grid = light ? '#e3e7ec' : '#2e3842', line = light ? '#8894a0' : '#667482';
  const panel = light ? '#ffffff' : '#1c232b';
  const out = {paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', 'font.color': ink,
    'hoverlabel.bgcolor': panel, 'hoverlabel.bordercolor': line, 'hoverlabel.font.color': ink, 'legend.bgcolor': 'rgba(0,0,0,0)'};
  const axes = new Set(Object.keys(layout).filter(k => /^[xy]axis\d*$/.test(k)));
  axes.forEach(a => { out[a + '.gridcolor'] = grid; out[a + '.zerolinecolor'] = line; out[a + '.linecolor'] = line; out[a + '.tickcolor'] = line; });
  (layout.shapes || []).forEach((s, i) => { out[`shapes[${i}].line.color`] = line; });
  return out;
};
const draw = async div => {
  const spec = JSON.parse(div.querySelector('script[type="application/json"]').textContent);
  const layout = spec.layout || {};
  layout.width = widthOf(div);
  layout.height = heightOf(layout, layout.width);
  layout.autosize = false;
  // buttons by name: plotly's own set has one that uploads the figure
  const config = Object.assign({}, spec.config || {}, {displaylogo: false, responsive: false, scrollZoom: false, plotlyServerURL: '', sendData: false,
    modeBarButtons: [['toImage', 'zoom2d', 'pan2d', 'resetScale2d']], toImageButtonOptions: {format: 'svg', filename: div.dataset.name || 'figure'}});
  div.textContent = '';
  await Plotly.newPlot(div, spec.data, layout, config);
  await Plotly.relayout(div, theme(div.layout));
  div.style.minHeight = '';
  div.dataset.drawn = 'yes';
};
const refit = () => plots.forEach(div => {
  if (div.dataset.drawn !== 'yes') return;
  const width = widthOf(div);
  if (Math.abs(width - div.layout.width) > 1) Plotly.relayout(div, {width, height: heightOf(div.layout, width)});
});
const repaint = () => plots.forEach(div => { if (div.dataset.drawn === 'yes') Plotly.relayout(div, theme(div.layout)); });
(async () => {
  for (const div of plots) {
    try { await draw(div); }
    catch (err) { div.dataset.drawn = 'failed'; console.error('a figure could not be drawn', err); }
    await new Promise(r => setTimeout(r, 0));
  }
  document.documentElement.dataset.ready = 'yes';
})();
let timer;
addEventListener('resize', () => { clearTimeout(timer); timer = setTimeout(refit, 120); });
dark.addEventListener('change', repaint);
all('details').forEach(d => d.addEventListener('toggle', refit));

/* ---- print: everything open, light, page width ---- */
let opened = [];
addEventListener('beforeprint', () => {
  printing = true;
  opened = all('details:not([open])'); opened.forEach(d => { d.open = true; });
  repaint(); refit();
});
addEventListener('afterprint', () => {
  printing = false;
  opened.forEach(d => { d.open = false; }); repaint(); refit();
});

/* ---- deep links open what is folded around their target ---- */
const reveal = () => {
  const id = decodeURIComponent(location.hash.slice(1));
  const target = id && document.getElementById(id);
  if (!target) return;
  for (let el = target; el; el = el.parentElement) if (el.tagName === 'DETAILS') el.open = true;
  target.scrollIntoView();
};
addEventListener('hashchange', reveal);
if (location.hash) addEventListener('load', reveal);

/* ---- contents: folded on a narrow screen, follows the reader on a wide one ---- */
const toc = document.querySelector('.toc details');
if (toc) {
  const wide = matchMedia('(min-width:1100px)');
  const fit = () => { toc.open = wide.matches; };
  fit(); wide.addEventListener('change', fit);
  toc.addEventListener('toggle', () => { if (wide.matches) toc.open = true; });
  const links = new Map(all('a', toc).map(a => [decodeURIComponent(a.hash.slice(1)), a]));
  const heads = [...links.keys()].map(id => document.getElementById(id)).filter(Boolean);
  const spy = () => {
    let here = heads[0];
    for (const h of heads) if (h.offsetParent && h.getBoundingClientRect().top < 140) here = h;
    links.forEach((a, id) => a.classList.toggle('here', here && id === here.id));
  };
  addEventListener('scroll', spy, {passive: true}); spy();
  all('a', toc).forEach(a => a.addEventListener('click', () => { if (!wide.matches) toc.open = false; setTimeout(reveal, 0); }));
}

/* ---- a table without a download of its own gets one, made from what it shows ---- */
all('table').forEach((table, i) => {
  if (table.closest('figure.table')) return;
  if (!table.parentElement.classList.contains('scroll')) {
    const box = document.createElement('div'); box.className = 'scroll'; box.tabIndex = 0;
    table.replaceWith(box); box.append(table);
  }
  const button = document.createElement('button');
  button.className = 'csv'; button.type = 'button'; button.textContent = 'Download CSV';
  button.addEventListener('click', () => {
    const quote = s => /[",\n]/.test(s) ? '"' + s.replaceAll('"', '""') + '"' : s;
    const text = [...table.rows].map(r => [...r.cells].map(c => quote(c.innerText.trim())).join(',')).join('\r\n');
    const a = document.createElement('a');
    a.href = URL.createObjectURL(new Blob(['\ufeff' + text], {type: 'text/csv'}));
    a.download = `table-${i + 1}.csv`; a.click(); setTimeout(() => URL.revokeObjectURL(a.href), 1000);
  });
  const line = document.createElement('p'); line.className = 'tools'; line.append(button);
  table.parentElement.after(line);
});

/* ---- tables to sort and to search: a click on a heading sorts, a second one turns the order round ---- */
all('table.sortable').forEach(table => {
  const body = table.tBodies[0], heads = all('thead th', table);
  const groups = () => {                                            // a row with the rows that belong to it
    const out = [];
    for (const row of body.rows) row.classList.contains('why') && out.length ? out[out.length - 1].push(row) : out.push([row]);
    return out;
  };
  const key = (row, i) => row.cells[i].dataset.key;
  heads.forEach((th, i) => th.querySelector('button').addEventListener('click', () => {
    const numeric = th.classList.contains('num');
    const way = th.getAttribute('aria-sort') === (numeric ? 'descending' : 'ascending') ? (numeric ? 1 : -1) : (numeric ? -1 : 1);
    heads.forEach(h => h.removeAttribute('aria-sort'));
    th.setAttribute('aria-sort', way > 0 ? 'ascending' : 'descending');
    const sorted = groups().map(g => [key(g[0], i), g]);
    sorted.sort(([a], [b]) => (a === '') - (b === '') || way * (numeric ? a - b : a.localeCompare(b)));   // what is missing stays last
    sorted.forEach(([, g]) => g.forEach(r => body.append(r)));
  }));
  const search = document.querySelector(`input.search[aria-controls="${table.id}"]`);
  if (search) search.addEventListener('input', () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    groups().forEach(g => { const text = g.map(r => r.textContent).join(' ').toLowerCase(); const hit = words.every(w => text.includes(w)); g.forEach(r => { r.hidden = !hit; }); });
  });
});
})();
