"""JavaScript for what the page must do at once, without asking the server."""

# Side bar: on a narrow screen it would cover the conversation, so it starts closed.
# Scrolling: the conversation follows its end until somebody scrolls up, and again once they are back at the end.
# Gradio's own autoscroll pulls readers down again while an answer is being written.
ON_LOAD = """() => {
    if (innerWidth < 800) document.querySelector('#side .toggle-button')?.click()
    const page = window.chatmill = {sent: null, typed: '', follow: true}
    const panel = () => document.querySelector('#chat .bubble-wrap')
    let last = 0
    document.addEventListener('scroll', event => {
        if (event.target !== panel()) return
        const {scrollTop, scrollHeight, clientHeight} = event.target
        if (scrollHeight - scrollTop - clientHeight < 40) page.follow = true
        else if (scrollTop < last) page.follow = false
        last = scrollTop
    }, true)
    const toEnd = () => { if (page.follow && panel()) panel().scrollTop = panel().scrollHeight }
    new MutationObserver(toEnd).observe(document.body, {childList: true, subtree: true, characterData: true})
    addEventListener('resize', toEnd)
    document.addEventListener('keydown', event => {
        if (event.key === 'Enter' && event.target.matches('#box textarea')) page.sent = event.target.value
    }, true)
    document.addEventListener('click', () => { page.sent = null }, true)
    document.addEventListener('input', event => {
        if (event.isTrusted && event.target.matches('#box textarea')) page.typed = event.target.value
    }, true)
}"""

# The box is emptied here and not by the server, whose answer may come when the next message is being typed. The text
# sent is what the box held when Enter was pressed, as Gradio calls this a little later.
ON_SEND = """(current, ...given) => {
    const box = document.querySelector('#box textarea'), text = window.chatmill.sent ?? current
    box.value = box.value.startsWith(text) ? box.value.slice(text.length) : ''
    box.dispatchEvent(new Event('input', {bubbles: true}))
    Object.assign(window.chatmill, {sent: null, typed: box.value, follow: true})
    return [text, ...given]
}"""

# A message that could not be answered returns to the box and replaces what was typed since: keep both.
AFTER_SEND = """(text) => {
    const typed = window.chatmill.typed
    return typed && !text.includes(typed) ? [text + '\\n' + typed] : []
}"""
