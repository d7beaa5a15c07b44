// The page of runs under way: asks its own server whether anything is new, and swaps <main>.
function kept(main) {
  const choices = {};
  for (const key of ['label', 'point', 'seed', 'client']) {
    choices[key] = main.querySelector(`#drill-${key}`)?.value;
  }
  return {
    choices,
    open: new Map([...main.querySelectorAll('details[id]')].map(d => [d.id, d.open])),
    sorted: [...main.querySelectorAll('.table[id] table[data-sorted]')].map(t =>
      [t.closest('.table').id, ...t.dataset.sorted.split(' ')]),
    scrolled: [...main.querySelectorAll('.table[id] .scroll')].map(s =>
      [s.parentElement.id, s.scrollLeft, s.scrollTop]),
    large: [...main.querySelectorAll('figure.large')].map(f => f.id),
    focus: main.contains(document.activeElement) ? document.activeElement.id : '',
    x: window.scrollX, y: window.scrollY,
  };
}

function restore(main, before) {
  for (const d of main.querySelectorAll('details[id]')) {
    if (before.open.has(d.id)) d.open = before.open.get(d.id);
  }
  const inside = (id, what) => document.getElementById(id)?.querySelector(what);
  for (const [id, column, direction] of before.sorted) {
    const table = inside(id, 'table');
    if (table && table.tHead.rows[0].cells.length > Number(column)) sortRows(table, Number(column), direction);
  }
  for (const id of before.large) inside(id, '[data-enlarge]')?.click();
  if (main.querySelector('#drill-data')) page.choose(before.choices);
  for (const [id, left, top] of before.scrolled) inside(id, '.scroll')?.scrollTo({left, top, behavior: 'instant'});
  if (before.focus) document.getElementById(before.focus)?.focus({preventScroll: true});
  window.scrollTo({left: before.x, top: before.y, behavior: 'instant'});
}

function live() {
  const settings = JSON.parse(document.getElementById('live-settings').textContent);
  const sign = document.getElementById('connection');
  const headers = settings.token ? {Authorization: `Bearer ${settings.token}`} : {};
  let version = null;
  const ask = async address => {
    const answer = await fetch(address, {headers, cache: 'no-store', credentials: 'same-origin'});
    if (!answer.ok) throw new Error(String(answer.status));
    return answer;
  };
  const poll = async () => {
    try {
      const news = (await (await ask(settings.state)).json()).version;
      if (news !== version) {
        const text = await (await ask(settings.main)).text();
        const fresh = new DOMParser().parseFromString(text, 'text/html').querySelector('main');
        const old = document.querySelector('main'), before = kept(old);
        old.replaceWith(fresh);
        start(fresh);
        restore(fresh, before);
        version = news;
      }
      sign.textContent = 'live';
      sign.classList.remove('lost');
    } catch {
      sign.textContent = 'no connection; trying again';
      sign.classList.add('lost');
    }
    setTimeout(poll, 1000 * settings.seconds);
  };
  poll();
}

page.live = live;
