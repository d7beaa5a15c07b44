// One client of one run: its accuracy by round, when it took part, what it holds.
const SIGNS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_';
const NOTHING = 4095;

function accuracies(text, clients) {
  const rows = [];
  for (let i = 0; i < text.length; i += 2 * clients) {
    const row = [];
    for (let k = 0; k < clients; k++) {
      const at = i + 2 * k;
      const whole = 64 * SIGNS.indexOf(text[at]) + SIGNS.indexOf(text[at + 1]);
      row.push(whole === NOTHING ? null : whole / 10);
    }
    rows.push(row);
  }
  return rows;
}

function mask(text, rounds, clients) {
  const bytes = atob(text || '');
  const bit = i => (bytes.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1;
  return Array.from({length: rounds}, (_, t) =>
    Array.from({length: clients}, (_, k) => Boolean(text && bit(t * clients + k))));
}

function mean(values) {
  const known = values.filter(v => v !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
}

function read(data, run) {
  const played = data.rounds[run.t];
  return {
    rounds: data.rounds[run.r], played, examples: data.examples[run.e], clients: run.k,
    accuracy: accuracies(run.a, run.k), part: mask(run.b, played.length, run.k),
    lost: run.x ? mask(run.x, played.length, run.k) : null,
    holding: run.h === undefined ? null : data.holdings[run.h],
  };
}

function steps(low, high, most) {
  const raw = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9; v += step) found.push(Number(v.toFixed(6)));
  return found;
}

function line(points, x, y) {
  let path = '', drawing = false;
  for (const [t, value] of points) {
    if (value === null) { drawing = false; continue; }
    path += `${drawing ? 'L' : 'M'}${x(t).toFixed(1)} ${y(value).toFixed(1)}`;
    drawing = true;
  }
  return path;
}

function curve(run, client, width) {
  const height = Math.max(220, Math.min(330, 0.52 * width));
  const [left, right, top, bottom] = [36, 10, 30, 48];
  const last = Math.max(...run.rounds, ...run.played, 1);
  const first = Math.min(1, ...run.rounds);
  const x = t => left + (width - left - right) * (last > first ? (t - first) / (last - first) : 0.5);
  const y = v => top + (height - top - bottom) * (1 - v / 100);
  const svg = draw('svg', {viewBox: `0 0 ${width} ${height}`, role: 'img',
    'aria-label': `Accuracy of client ${client} by round`});
  for (const v of [0, 25, 50, 75, 100]) {
    svg.append(draw('line', {class: 'grid', x1: left, x2: width - right, y1: y(v), y2: y(v)}));
    svg.append(draw('text', {x: left - 8, y: y(v) + 4, 'text-anchor': 'end'}, v));
  }
  svg.append(draw('line', {class: 'axis', x1: left, x2: width - right, y1: y(0), y2: y(0)}));
  for (const t of steps(first, last, width / 70).filter(Number.isInteger)) {
    svg.append(draw('text', {x: x(t), y: height - 18, 'text-anchor': 'middle'}, t));
  }
  svg.append(draw('text', {x: width - right, y: height - 4, 'text-anchor': 'end'}, 'round'));
  svg.append(draw('text', {x: 4, y: 14}, 'accuracy in %'));
  svg.append(draw('path', {class: 'mean',
    d: line(run.rounds.map((t, i) => [t, mean(run.accuracy[i])]), x, y)}));
  const own = run.rounds.map((t, i) => [t, run.accuracy[i][client]]);
  svg.append(draw('path', {class: 'one', d: line(own, x, y)}));
  if (own.length <= 40) {
    for (const [t, v] of own) if (v !== null) svg.append(draw('circle', {cx: x(t), cy: y(v), r: 2.6}));
  }
  const each = (width - left - right) / Math.max(1, run.played.length);
  const mark = Math.max(1, Math.min(6, 0.7 * each));
  run.played.forEach((t, i) => {
    if (!run.part[i][client]) return;
    const gone = run.lost && run.lost[i][client];
    svg.append(draw('rect', {class: gone ? 'lost' : 'part', x: x(t) - mark / 2, y: y(0) + 5, width: mark, height: 8}));
  });
  return svg;
}

function classes(run, client, width) {
  const {names, counts} = run.holding;
  const row = counts[client], most = Math.max(...row, 1), height = 120, base = 92;
  const each = (width - 20) / row.length;
  const svg = draw('svg', {viewBox: `0 0 ${width} ${height}`, role: 'img',
    'aria-label': `Training examples of client ${client} by class`});
  row.forEach((n, c) => {
    const tall = n ? Math.max(1.5, 62 * n / most) : 0, at = 10 + c * each;
    const bar = draw('rect', {class: 'bar', x: at + 0.12 * each, y: base - tall, width: 0.76 * each, height: tall});
    bar.append(draw('title', {}, `${names[c]}: ${n}`));
    svg.append(bar);
    if (each < 26) return;
    if (n) svg.append(draw('text', {x: at + each / 2, y: base - tall - 4, 'text-anchor': 'middle'}, n));
    const fits = Math.floor(each / 6.2), name = names[c];
    svg.append(draw('text', {x: at + each / 2, y: base + 16, 'text-anchor': 'middle'},
      name.length > fits ? name.slice(0, Math.max(1, fits - 1)) + '…' : name));
  });
  svg.append(draw('line', {class: 'axis', x1: 10, x2: width - 10, y1: base, y2: base}));
  svg.append(draw('text', {x: 10, y: 12}, 'training examples by class'));
  return svg;
}

function clientTable(run, choose) {
  const titles = ['client', 'examples', 'last accuracy in %', 'took part'];
  if (run.lost) titles.push('lost');
  if (run.holding) titles.push('classes');
  const table = make('table', {'data-sortable': '', id: 'drill-clients'});
  const head = table.createTHead().insertRow();
  for (const title of titles) head.append(make('th', {scope: 'col'}, title));
  const body = table.createTBody();
  for (let k = 0; k < run.clients; k++) {
    const judged = run.accuracy.map(row => row[k]).filter(v => v !== null);
    const cells = [run.examples[k] ?? '–', judged.length ? judged[judged.length - 1].toFixed(1) : '–',
      run.part.filter(row => row[k]).length];
    if (run.lost) cells.push(run.lost.filter(row => row[k]).length);
    if (run.holding) cells.push(run.holding.counts[k].filter(n => n > 0).length);
    const row = body.insertRow();
    row.dataset.client = k;
    const name = make('th', {scope: 'row', 'data-key': k});
    const button = make('button', {type: 'button', 'aria-label': `Client ${k}`}, k);
    name.append(button);
    row.append(name);
    for (const text of cells) row.append(make('td', {'data-key': text === '–' ? '' : text}, text));
    row.addEventListener('click', () => choose(k));
  }
  sortable(table);
  return table;
}

function drill(main) {
  const island = main.querySelector('#drill-data');
  if (!island) return;
  const data = JSON.parse(island.textContent);
  const at = id => main.querySelector(`#drill-${id}`);
  const selects = {};
  for (const [key, title] of [['label', 'Method'], ['point', 'Point'], ['seed', 'Seed'], ['client', 'Client']]) {
    const label = make('label', {}, title);
    selects[key] = make('select', {id: `drill-${key}`});
    label.append(selects[key]);
    label.hidden = key === 'point' && data.points.length < 2;
    at('choices').append(label);
  }
  const fill = (key, values, name) => {
    const before = selects[key].value;
    selects[key].replaceChildren(...values.map(v => make('option', {value: v}, name ? name(v) : v)));
    if (values.map(String).includes(before)) selects[key].value = before;
  };
  const unique = values => [...new Set(values)].sort((a, b) => a - b);
  let run = null, shown = null;
  const paint = () => {
    const client = Number(selects.client.value), width = Math.max(260, at('chart').clientWidth);
    at('title').textContent = `Client ${client}`;
    at('chart').replaceChildren(curve(run, client, width));
    at('classes').replaceChildren(...(run.holding ? [classes(run, client, width)] : []));
    for (const row of at('table').querySelectorAll('tbody tr')) {
      row.classList.toggle('chosen', Number(row.dataset.client) === client);
    }
  };
  const update = () => {
    fill('label', unique(data.runs.map(r => r.l)), l => data.labels[l]);
    const same = data.runs.filter(r => r.l === Number(selects.label.value));
    fill('point', unique(same.map(r => r.p)), p => data.points[p]);
    const here = same.filter(r => r.p === Number(selects.point.value));
    fill('seed', unique(here.map(r => r.s)));
    const entry = here.find(r => r.s === Number(selects.seed.value));
    if (entry !== shown) {
      [shown, run] = [entry, read(data, entry)];
      fill('client', Array.from({length: run.clients}, (_, k) => k));
      const sorted = at('table').querySelector('table')?.dataset.sorted;
      const table = clientTable(run, k => { selects.client.value = k; paint(); });
      at('table').replaceChildren(table);
      if (sorted) sortRows(table, Number(sorted.split(' ')[0]), sorted.split(' ')[1]);
      at('keys').hidden = false;
      at('keys').querySelector('.lost').hidden = !run.lost;
    }
    paint();
  };
  for (const select of Object.values(selects)) select.addEventListener('change', update);
  page.choose = wanted => {
    for (const key of ['label', 'point', 'seed', 'client']) {
      if ([...selects[key].options].some(o => o.value === wanted[key])) selects[key].value = wanted[key];
      update();
    }
  };
  update();
  if (page.resizing) page.resizing.disconnect();
  let width = at('chart').clientWidth;
  page.resizing = new ResizeObserver(() => {
    if (at('chart').clientWidth !== width) { width = at('chart').clientWidth; paint(); }
  });
  page.resizing.observe(at('chart'));
}

page.starters.push(drill);
