theme();
start(document.querySelector('main'));
unfold();
window.addEventListener('hashchange', unfold);
if (page.live) page.live();
