package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/sallyport-ssh/sallyport/internal/record"
)

type playCmd struct {
	File      string  `arg:"" placeholder:"FILE" help:"The recording, an asciicast of version 2. If it has several parts, all are played."`
	Speed     float64 `default:"1" placeholder:"N" help:"Play N times as fast."`
	IdleLimit float64 `placeholder:"S" help:"Shorten pauses to S seconds."`
}

// playReset resets the state that a recording may leave in a terminal if it ends
// early: modes, colours, a hidden cursor (DECSTR), the alternate screen, mouse
// reporting, and bracketed paste.
const playReset = "\x1b[!p\x1b[?1049l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[0m\r\n"

var errPlayEnded = errors.New("ended by the viewer")

// Run plays the recording on standard output. On a terminal, the space bar pauses
// and resumes, and q or control-C ends it.
func (c *playCmd) Run(ctx context.Context, s streams) error {
	if !(c.Speed > 0) || math.IsInf(c.Speed, 0) {
		return fmt.Errorf("--speed %g: must be more than 0", c.Speed)
	}
	if !(c.IdleLimit >= 0) || c.IdleLimit > 1e6 {
		return fmt.Errorf("--idle-limit %g: must be from 0 to 1000000 seconds", c.IdleLimit)
	}
	reader, err := record.Open(c.File)
	if err != nil {
		return err
	}
	defer reader.Close()

	player := &record.Player{Speed: c.Speed, IdleLimit: time.Duration(c.IdleLimit * float64(time.Second))}
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	if in := int(os.Stdin.Fd()); term.IsTerminal(in) {
		// The recording may have sequences to which a terminal sends replies. They
		// must not be displayed, nor reach the shell afterwards.
		before, err := term.MakeRaw(in)
		if err != nil {
			return err
		}
		defer func() {
			unix.IoctlSetInt(in, unix.TCFLSH, unix.TCIFLUSH)
			term.Restore(in, before)
		}()
		pause := make(chan struct{})
		player.Pause = pause
		go playKeys(os.Stdin, pause, func() { end(errPlayEnded) }) // until the process ends
	}
	if out, ok := s.out.(*os.File); ok && term.IsTerminal(int(out.Fd())) {
		defer io.WriteString(s.out, playReset)
		if w, h, err := term.GetSize(int(out.Fd())); err == nil && (w < reader.Header.Width || h < reader.Header.Height) {
			fmt.Fprintf(s.err, "The recorded terminal had %d columns and %d rows; this one has %d and %d.\r\n",
				reader.Header.Width, reader.Header.Height, w, h)
		}
	}
	switch err := player.Play(ctx, s.out, reader); {
	case err == nil, errors.Is(err, errPlayEnded):
		return nil
	case errors.Is(err, record.ErrTruncated):
		fmt.Fprintf(s.err, "\r\n%s ends within a line: it is still being written, or its gateway was killed.\r\n", c.File)
		return nil
	case ctx.Err() != nil:
		return errors.New("interrupted")
	default:
		return fmt.Errorf("%s: %w", c.File, err)
	}
}

// playKeys reads the viewer's keys until one ends the recording.
func playKeys(in io.Reader, pause chan<- struct{}, end func()) {
	buf := make([]byte, 1)
	for {
		if _, err := in.Read(buf); err != nil {
			return
		}
		switch buf[0] {
		case ' ':
			pause <- struct{}{}
		case 'q', 3:
			end()
			return
		}
	}
}
