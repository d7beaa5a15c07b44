'use strict';
const SVG = 'http://www.w3.org/2000/svg';
const page = {starters: [], last: {}};

function make(name, attributes, text) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function draw(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// Rows in the order of a column: numbers as numbers, what is empty always last.
function sortRows(table, column, direction) {
  const body = table.tBodies[0];
  const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent;
  const rows = [...body.rows].map(row => ({row, text: key(row)}));
  const numeric = rows.every(r => r.text === '' || !Number.isNaN(Number(r.text)));
  const sign = direction === 'descending' ? -1 : 1;
  rows.sort((a, b) => {
    if (a.text === '' || b.text === '') return (a.text === '') - (b.text === '');
    return sign * (numeric ? Number(a.text) - Number(b.text) : a.text.localeCompare(b.text));
  });
  body.append(...rows.map(r => r.row));
  for (const [i, th] of [...table.tHead.rows[0].cells].entries()) {
    if (i === column) th.setAttribute('aria-sort', direction);
    else th.removeAttribute('aria-sort');
  }
  table.dataset.sorted = `${column} ${direction}`;
}

function sortable(table) {
  for (const [i, th] of [...table.tHead.rows[0].cells].entries()) {
    const button = make('button', {type: 'button', title: 'Sort by this column'}, th.textContent || ' ');
    th.replaceChildren(button);
    button.addEventListener('click', () => {
      const first = i === 0 || th.classList.contains('name') ? 'ascending' : 'descending';
      const now = th.getAttribute('aria-sort');
      const other = now === 'ascending' ? 'descending' : 'ascending';
      sortRows(table, i, now ? other : first);
    });
  }
}

// One series of a figure stands out: under the pointer, or picked with the arrow keys.
function pickable(svg) {
  const marked = [...svg.querySelectorAll('[data-series]')];
  const names = [...new Set(marked.map(e => e.dataset.series))];
  if (names.length < 2) return;
  const pick = name => {
    svg.classList.toggle('picking', name !== null);
    for (const e of marked) e.classList.toggle('picked', e.dataset.series === name);
  };
  let at = -1;
  svg.addEventListener('pointerover', event => {
    const found = event.target.closest('[data-series]');
    pick(found ? found.dataset.series : null);
  });
  svg.addEventListener('pointerleave', () => pick(null));
  svg.setAttribute('tabindex', '0');
  svg.addEventListener('blur', () => { at = -1; pick(null); });
  svg.addEventListener('keydown', event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!step && event.key !== 'Escape') return;
    event.preventDefault();
    if (!step) at = -1;
    else at = at < 0 ? (step > 0 ? 0 : names.length - 1) : (at + step + names.length) % names.length;
    pick(at < 0 ? null : names[at]);
  });
}

function enlargeable(button) {
  const figure = button.closest('figure');
  button.hidden = false;
  button.addEventListener('click', () => {
    const large = figure.classList.toggle('large');
    button.setAttribute('aria-pressed', String(large));
    button.textContent = large ? 'Reduce' : 'Enlarge';
  });
}

function copyable(button) {
  if (!navigator.clipboard) return;
  button.hidden = false;
  button.addEventListener('click', async () => {
    const text = button.parentElement.querySelector('code').textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = 'Copied';
    } catch {
      button.textContent = 'Not allowed';
    }
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  });
}

function contents(main) {
  const list = main.querySelector('#contents');
  if (!list) return;
  if (window.innerWidth < 1120) list.open = false;
  const links = new Map([...list.querySelectorAll('a')].map(a => [a.hash.slice(1), a]));
  const seen = new Set();
  if (page.watching) page.watching.disconnect();
  page.watching = new IntersectionObserver(entries => {
    for (const e of entries) seen[e.isIntersecting ? 'add' : 'delete'](e.target.id);
    const first = [...links.keys()].find(id => seen.has(id));
    for (const [id, a] of links) {
      if (id === first) a.setAttribute('aria-current', 'true');
      else a.removeAttribute('aria-current');
    }
  }, {rootMargin: '-10% 0px -60% 0px'});
  for (const section of main.querySelectorAll('.body > section')) page.watching.observe(section);
}

function theme() {
  const button = document.getElementById('theme');
  const wanted = window.matchMedia('(prefers-color-scheme: dark)');
  const dark = () => {
    const set = document.documentElement.dataset.theme;
    return set ? set === 'dark' : wanted.matches;
  };
  const show = () => { button.textContent = dark() ? 'Light' : 'Dark'; };
  button.hidden = false;
  button.addEventListener('click', () => {
    document.documentElement.dataset.theme = dark() ? 'light' : 'dark';
    show();
  });
  wanted.addEventListener('change', show);
  show();
}

// A link to what is folded away opens it.
function unfold() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  for (let e = target; e; e = e.parentElement) if (e.tagName === 'DETAILS') e.open = true;
}

page.starters.push(main => {
  main.querySelectorAll('table[data-sortable]').forEach(sortable);
  main.querySelectorAll('figure svg').forEach(pickable);
  main.querySelectorAll('[data-enlarge]').forEach(enlargeable);
  main.querySelectorAll('[data-copy]').forEach(copyable);
  contents(main);
});

function start(main) {
  for (const starter of page.starters) starter(main);
}
