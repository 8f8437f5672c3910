/* Search without a server: a browser refuses workers for pages opened as files, so a hidden frame does their work. */
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inner = this.frame.contentWindow
      this.receive = event => {
        if (event.source !== inner) return
        const copy = new MessageEvent("message", { data: event.data })
        this.dispatchEvent(copy)
        if (this.onmessage) this.onmessage(copy)
      }
      addEventListener("message", this.receive)
      inner.document.write(`<body><script>
        postMessage = data => parent.postMessage(data, "*")
        importScripts = (...urls) => urls.reduce((last, url) => last.then(() => new Promise(resolve => {
          const script = document.createElement("script")
          script.src = url
          script.onload = resolve
          document.body.append(script)
        })), Promise.resolve())
      <\/script><script src="${url}"><\/script></body>`)
      this.ready = new Promise(resolve => { this.frame.onload = resolve })
      inner.document.close()
    }
    postMessage(data) {
      const send = () => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
      this.ready.then(send)
    }
    terminate() {
      removeEventListener("message", this.receive)
      this.frame.remove()
    }
  }
