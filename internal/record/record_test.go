package record

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func read(t *testing.T, path string) (Header, []Event) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r, err := NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	var events []Event
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			return r.Header, events
		}
		if err != nil {
			t.Fatalf("%v\n%s", err, data)
		}
		events = append(events, e)
	}
}

func TestRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		store := &Store{Dir: dir}
		r, err := store.Create(Header{
			Width: 80, Height: 24, Command: "top", Title: "alice", Env: map[string]string{"TERM": "xterm"},
			User: "alice", Profile: "prod", Conn: "abcd2345", Channel: 3,
		})
		if err != nil {
			t.Fatal(err)
		}
		// synctest begins at midnight of 2000-01-01 UTC.
		if want := filepath.Join(dir, "alice", "2000-01-01", "abcd2345-3.cast"); r.Path != want {
			t.Errorf("path %s, want %s", r.Path, want)
		}
		time.Sleep(1500 * time.Millisecond)
		r.Output([]byte("h\xc3"), false)
		r.Output([]byte("\xe2"), true)
		r.Input([]byte("\xf0\x9f"))
		time.Sleep(time.Second)
		r.Output([]byte("\xa4<&>\xff\xc3"), false) // ä, then bytes that are not UTF-8
		r.Output([]byte("\x82\xac"), true)
		r.Input([]byte("\x98\x80"))
		r.Resize(132, 43)
		r.Resize(1<<30, -1)
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if err := r.Output([]byte("late"), false); !errors.Is(err, os.ErrClosed) {
			t.Errorf("after the end: %v", err)
		}
		header, got := read(t, r.Path)
		if header.Version != 2 || header.Timestamp != time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC).Unix() || header.Command != "top" ||
			header.Width != 80 || header.Height != 24 || header.Env["TERM"] != "xterm" || header.Conn != "abcd2345" {
			t.Errorf("header %+v", header)
		}
		want := []Event{
			{1500 * time.Millisecond, "o", "h"},
			{2500 * time.Millisecond, "o", "ä<&>\ufffd"},
			{2500 * time.Millisecond, "o", "€"},
			{2500 * time.Millisecond, "i", "😀"},
			{2500 * time.Millisecond, "r", "132x43"},
			{2500 * time.Millisecond, "r", "10000x0"},
			{2500 * time.Millisecond, "o", "\ufffd"},
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("\n got %q\nwant %q", got, want)
		}
		if _, err := store.Create(Header{User: "alice", Conn: "abcd2345", Channel: 3}); !errors.Is(err, os.ErrExist) {
			t.Errorf("a recording is overwritten: %v", err)
		}
	})
}

// FuzzText splits text into pieces, and wants the whole text to be recorded.
func FuzzText(f *testing.F) {
	f.Add([]byte("grüße €😀"), uint8(1))
	f.Add([]byte("\xf0\x9f\x98\xff\xc3\xe2\x82"), uint8(2))
	f.Add(bytes.Repeat([]byte("ä"), 40_000), uint8(255))
	dir := f.TempDir()
	n := 0
	f.Fuzz(func(t *testing.T, text []byte, step uint8) {
		n++
		r, err := (&Store{Dir: dir}).Create(Header{User: "u", Conn: fmt.Sprint(os.Getpid(), "-", n)})
		if err != nil {
			t.Fatal(err)
		}
		defer os.Remove(r.Path)
		for p := text; len(p) > 0; {
			k := min(len(p), int(step)+1)
			if err := r.Output(p[:k:k], false); err != nil {
				t.Fatal(err)
			}
			p = p[k:]
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		var got strings.Builder
		_, events := read(t, r.Path)
		for _, e := range events {
			got.WriteString(e.Text)
		}
		// encoding/json replaces byte by byte, as ranging over a string does.
		if want := string([]rune(string(text))); got.String() != want {
			t.Errorf("\n got %q\nwant %q", got.String(), want)
		}
	})
}

func TestFolder(t *testing.T) {
	for in, want := range map[string]string{
		"alice": "alice", "a.b@c-d_e": "a.b@c-d_e", "..": "%2e.", ".": "%2e", "a/b": "a%2fb", "": "%", "%": "%25", "a\x00": "a%00", "é": "%c3%a9",
	} {
		if got := pathElement(in); got != want {
			t.Errorf("pathElement(%q) = %q, want %q", in, got, want)
		}
	}
}

// TestParts writes a recording of several parts, and reads them as one.
func TestParts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const maxSize, events = 10_000, 1000
		r, err := (&Store{Dir: t.TempDir(), MaxSize: maxSize}).Create(Header{User: "alice", Conn: "c", Width: 80, Height: 24})
		if err != nil {
			t.Fatal(err)
		}
		for n := range events {
			if n == events/2 {
				r.Resize(132, 43)
			}
			if err := r.Output(fmt.Appendf(nil, "%d ä%s\n", n, strings.Repeat("x", n%100)), false); err != nil {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		parts := r.Parts()
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if parts < 8 {
			t.Fatalf("%d parts", parts)
		}
		for part := 1; part <= parts; part++ {
			path := partPath(r.Path, part)
			if info, err := os.Stat(path); err != nil || info.Size() > maxSize || info.Mode().Perm() != 0o600 {
				t.Fatalf("part %d: %v, %v", part, info, err)
			}
			header, got := read(t, path)
			if part > 1 && header.Part != part || header.Conn != "c" || header.Timestamp != 946684800+int64(header.Offset) {
				t.Errorf("header of part %d: %+v", part, header)
			}
			if want := map[bool]int{true: 132, false: 80}[part > parts*2/3]; part < parts/3 && header.Width != 80 || part > parts*2/3 && header.Width != want {
				t.Errorf("part %d is %d columns wide", part, header.Width)
			}
			if got[0].At > time.Second {
				t.Errorf("part %d begins at %v", part, got[0].At)
			}
			if last := got[len(got)-1]; part < parts && (last.Code != "m" || last.Text != "the recording goes on in "+filepath.Base(partPath(r.Path, part+1))) {
				t.Errorf("part %d ends with %+v", part, last)
			}
		}
		for first := 1; first <= 2; first++ {
			reader, err := Open(partPath(r.Path, first))
			if err != nil {
				t.Fatal(err)
			}
			n, began := -1, 0
			for {
				e, err := reader.Next()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if e.Code != "o" {
					continue
				}
				var got int
				fmt.Sscanf(e.Text, "%d", &got)
				if n < 0 {
					n, began = got, got
				}
				if got != n || (e.At-time.Duration(n-began)*100*time.Millisecond).Abs() > time.Microsecond {
					t.Fatalf("event %d is %q at %v", n, e.Text, e.At)
				}
				n++
			}
			reader.Close()
			if n != events || (first == 1) != (began == 0) {
				t.Errorf("from part %d: events %d to %d", first, began, n)
			}
		}
	})
}

// TestPartsEnd: a recording ends if its next part cannot be created.
func TestPartsEnd(t *testing.T) {
	r, err := (&Store{Dir: t.TempDir(), MaxSize: 10_000}).Create(Header{User: "alice", Conn: "c"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(partPath(r.Path, 2), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		if err = r.Output(bytes.Repeat([]byte("x"), 100), false); err != nil {
			break
		}
	}
	if !errors.Is(err, os.ErrExist) || !errors.Is(r.Resize(1, 1), os.ErrExist) || !errors.Is(r.Close(), os.ErrExist) {
		t.Errorf("it ended with %v", err)
	}
	_, events := read(t, r.Path)
	if last := events[len(events)-1]; last.Code != "m" || !strings.HasPrefix(last.Text, "the recording ends here") {
		t.Errorf("the last event is %+v", last)
	}
}

// TestMaxPerUser: the recordings of one user, including those of other days, are
// limited, and those of another user are not affected.
func TestMaxPerUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &Store{Dir: t.TempDir(), MaxSize: 20_000, MaxPerUser: 100_000}
		old := filepath.Join(store.Dir, "alice", "1999-12-31", "x-0.cast")
		if err := os.MkdirAll(filepath.Dir(old), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(old, make([]byte, 50_000), 0o600); err != nil {
			t.Fatal(err)
		}
		fill := func(user, conn string) error {
			r, err := store.Create(Header{User: user, Conn: conn})
			for n := 0; err == nil && n < 300; n++ {
				err = r.Output(bytes.Repeat([]byte("x"), 100), false)
			}
			if r != nil {
				r.Close()
			}
			return err
		}
		if err := fill("alice", "a"); err != nil {
			t.Fatal(err)
		}
		if err := fill("alice", "b"); !errors.Is(err, ErrUserFull) {
			t.Errorf("the second ends with %v", err)
		}
		if err := fill("alice", "c"); !errors.Is(err, ErrUserFull) {
			t.Errorf("the third ends with %v", err)
		}
		if err := fill("bob", "d"); err != nil {
			t.Errorf("bob: %v", err)
		}
		var size int64
		files, _ := filepath.Glob(filepath.Join(store.Dir, "alice", "*", "*"))
		for _, path := range files {
			info, _ := os.Stat(path)
			size += info.Size()
		}
		if size > store.MaxPerUser || size < store.MaxPerUser*8/10 {
			t.Errorf("%d bytes of recordings", size)
		}
		if err := os.Remove(old); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if err := fill("alice", "e"); err != nil {
			t.Errorf("after some were deleted: %v", err)
		}
	})
}

// TestShare: one user cannot fill the file system. Other users can record, and so can
// she on the next day.
func TestShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		free := int64(20 << 20)
		store := &Store{Dir: t.TempDir(), space: func() int64 { return free }}
		fill := func(user, conn string, bytesMax int) (n int, err error) {
			r, err := store.Create(Header{User: user, Conn: conn})
			for ; err == nil && n < bytesMax; n += 32 << 10 {
				err = r.Output(bytes.Repeat([]byte("x"), 32<<10), false)
				free -= 32 << 10
			}
			if r != nil {
				r.Close()
			}
			return n, err
		}
		n, err := fill("alice", "a", 20<<20)
		if !errors.Is(err, errShare) || n < 3<<20 || n > 5<<20 {
			t.Errorf("it ends after %d bytes: %v", n, err)
		}
		if _, err := fill("bob", "b", 1<<20); err != nil {
			t.Errorf("bob: %v", err)
		}
		time.Sleep(24 * time.Hour)
		if _, err := fill("alice", "c", 1<<20); err != nil {
			t.Errorf("the next day: %v", err)
		}
	})
}

// TestNoTerminal: output without a terminal is recorded as a terminal would show it.
func TestNoTerminal(t *testing.T) {
	r, err := (&Store{Dir: t.TempDir()}).Create(Header{User: "alice", Conn: "c", NoTerminal: true})
	if err != nil {
		t.Fatal(err)
	}
	r.Output([]byte("a\nb\r"), false)
	r.Output([]byte("\nc"), true)
	r.Output([]byte("\n\n"), false)
	r.Input([]byte("typed\n"))
	r.Close()
	_, events := read(t, r.Path)
	var got strings.Builder
	for _, e := range events {
		got.WriteString(e.Text)
	}
	if want := "a\r\nb\r\r\nc\n\r\ntyped\n"; got.String() != want {
		t.Errorf("%q, want %q", got.String(), want)
	}
}

// TestFullDisk: a full disk leaves whole lines only.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a disk that can be filled needs root")
	}
	disk := t.TempDir()
	if err := syscall.Mount("none", disk, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(disk, syscall.MNT_DETACH) })
	r, err := (&Store{Dir: disk}).Create(Header{User: "alice", Conn: "c"})
	if err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		if err = r.Output(bytes.Repeat([]byte("x"), 1000), false); err != nil {
			break
		}
	}
	if !errors.Is(err, syscall.ENOSPC) || !errors.Is(r.Err(), syscall.ENOSPC) {
		t.Errorf("it ended with %v", err)
	}
	if _, events := read(t, r.Path); len(events) < 40 {
		t.Errorf("%d events", len(events))
	}
	if _, err := (&Store{Dir: disk}).Create(Header{User: "alice", Conn: "d"}); err == nil {
		t.Error("a recording begins on a full disk")
	}
	r.Close()
}

const header = `{"version":2,"width":80,"height":24}` + "\n"

func TestPlay(t *testing.T) {
	file := header + `[0.5,"o","a"]
[1.0,"i","typed"]
[61.0,"o","b"]
[60.0,"o","c"]
[61.5,"x",""]
[62.0,"o","d"]
`
	for _, tt := range []struct {
		player Player
		want   string
	}{
		{Player{}, "a@500ms b@1m1s c@1m1s d@1m2s "},
		{Player{Speed: 2}, "a@250ms b@30.5s c@30.5s d@31s "},
		{Player{IdleLimit: time.Second}, "a@500ms b@1.5s c@1.5s d@2.5s "},
		{Player{IdleLimit: time.Second, Speed: 10}, "a@50ms b@150ms c@150ms d@250ms "},
	} {
		synctest.Test(t, func(t *testing.T) {
			r, err := NewReader(strings.NewReader(file))
			if err != nil {
				t.Fatal(err)
			}
			out := &stamps{began: time.Now()}
			if err := tt.player.Play(t.Context(), out, r); err != nil || out.String() != tt.want {
				t.Errorf("%+v: %v\n got %s\nwant %s", tt.player, err, out, tt.want)
			}
		})
	}
}

// stamps notes the time of each write.
type stamps struct {
	text  strings.Builder
	began time.Time
}

func (s *stamps) String() string { return s.text.String() }

func (s *stamps) Write(p []byte) (int, error) {
	fmt.Fprintf(&s.text, "%s@%v ", p, time.Since(s.began))
	return len(p), nil
}

// TestPause: a paused player continues at the same place.
func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := NewReader(strings.NewReader(header + "[1,\"o\",\"a\"]\n[3,\"o\",\"b\"]\n"))
		pause := make(chan struct{})
		go func() {
			time.Sleep(2 * time.Second)
			pause <- struct{}{}
			time.Sleep(time.Hour)
			pause <- struct{}{}
		}()
		out := &stamps{began: time.Now()}
		player := &Player{Pause: pause}
		if err := player.Play(t.Context(), out, r); err != nil || out.String() != "a@1s b@1h0m3s " {
			t.Errorf("%v: %s", err, out)
		}
	})
}

func TestPlayEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		r, _ := NewReader(strings.NewReader(header + "[1e9,\"o\",\"a\"]\n"))
		if err := (&Player{Speed: 1e-300}).Play(ctx, io.Discard, r); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

func TestReadMistakes(t *testing.T) {
	for in, want := range map[string]string{
		"":                                  "not a recording: the file is empty",
		"#!/bin/sh\n":                       "not a recording: the first line",
		`{"width":80}` + "\n":               "not a recording: the first line",
		`{"version":1,"stdout":[]}` + "\n":  "an asciicast of version 1; only version 2",
		`{"version":3,"term":{}}` + "\n":    "an asciicast of version 3; only version 2",
		`{"version":2,"width":"x"}` + "\n":  "the header of the recording: ",
		header + "[1,\"o\",\"a\"]\n[1,\"o":  ErrTruncated.Error(),
		header + "[1,\"o\"]\n":              "line 2 of the recording: not an event",
		header + "[1,\"o\",\"a\",2]\n":      "line 2 of the recording: not an event",
		header + "{}\n":                     "line 2 of the recording: ",
		header + "\n[-1,\"o\",\"a\"]\n":     "line 3 of the recording: -1 is no time",
		header + "[1e10,\"o\",\"a\"]\n":     "line 2 of the recording: 1e+10 is no time",
		header + strings.Repeat("x", 2<<20): "line 2 of the recording is longer than",
		strings.Repeat("x", 2<<20):          "line 1 of the recording is longer than",
	} {
		r, err := NewReader(strings.NewReader(in))
		for err == nil {
			_, err = r.Next()
		}
		if !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%.60q: %v, want %s", in, err, want)
		}
	}
	// A last line without a newline is an event.
	r, _ := NewReader(strings.NewReader(header + "[1,\"o\",\"a\"]"))
	if e, err := r.Next(); err != nil || e.Text != "a" {
		t.Errorf("%+v, %v", e, err)
	}
}

// FuzzReader: no file makes the Reader panic, loop for ever or return decreasing
// times.
func FuzzReader(f *testing.F) {
	f.Add([]byte(header + "[0.5,\"o\",\"a\"]\n[1,\"r\",\"80x24\"]\n"))
	f.Add([]byte(header + "[0.5,\"o\",\"a"))
	f.Add([]byte(header + "[null,null,null]\n[1e308,\"o\",\"\"]\n"))
	f.Add([]byte(`{"version":1,"stdout":[[0,"a"]]}`))
	f.Add([]byte(`{"version":2,"env":{"TERM":1}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := NewReader(bytes.NewReader(data))
		if err != nil {
			return
		}
		var last time.Duration
		for n := 0; ; n++ {
			e, err := r.Next()
			if err != nil {
				return
			}
			if e.At < last || n > len(data) {
				t.Fatalf("event %d is at %v, after %v", n, e.At, last)
			}
			last = e.At
		}
	})
}
