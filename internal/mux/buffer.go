package mux

import "sync"

// A buffer holds data that has not been read, in chunks of a pool. An empty buffer has
// no chunk.
type buffer struct {
	chunks []*[]byte
	off    int // of the first unread byte in the first chunk
}

// chunkSize is how much WriteTo writes at once: the packets of one read from the
// network. smallChunk, in bytes too, is for keystrokes.
const (
	chunkSize  = 4 * MaxPacket
	smallChunk = 1 << 10
)

var chunks = sync.Pool{New: func() any { b := make([]byte, 0, chunkSize); return &b }}

func recycle(chunk *[]byte) {
	if cap(*chunk) == chunkSize {
		*chunk = (*chunk)[:0]
		chunks.Put(chunk)
	}
}

func (b *buffer) empty() bool { return len(b.chunks) == 0 }

func (b *buffer) add(data []byte) {
	if n := len(b.chunks); n > 0 {
		last := b.chunks[n-1]
		fits := min(len(data), cap(*last)-len(*last))
		*last = append(*last, data[:fits]...)
		data = data[fits:]
	}
	for len(data) > 0 {
		var chunk *[]byte
		if len(data) < smallChunk {
			small := make([]byte, 0, smallChunk)
			chunk = &small
		} else {
			chunk = chunks.Get().(*[]byte)
		}
		fits := min(len(data), cap(*chunk))
		*chunk = append(*chunk, data[:fits]...)
		data = data[fits:]
		b.chunks = append(b.chunks, chunk)
	}
}

func (b *buffer) read(p []byte) (n int) {
	for n < len(p) && len(b.chunks) > 0 {
		first := b.chunks[0]
		copied := copy(p[n:], (*first)[b.off:])
		n += copied
		if b.off += copied; b.off == len(*first) {
			b.pop()
			recycle(first)
		}
	}
	return n
}

func (b *buffer) pop() {
	b.chunks[0] = nil
	if b.chunks = b.chunks[1:]; len(b.chunks) == 0 {
		b.chunks = nil
	}
	b.off = 0
}

// take removes and returns the first chunk, or nil if there is none. The caller owns it.
func (b *buffer) take() *[]byte {
	if b.empty() {
		return nil
	}
	first := b.chunks[0]
	if b.off > 0 {
		rest := (*first)[b.off:]
		first = &rest
	}
	b.pop()
	return first
}
