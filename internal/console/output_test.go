package console

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestShortVersion(t *testing.T) {
	for version, want := range map[string]string{
		"sallyport gateway 1.2.3 go1.26.8 linux/amd64":              "1.2.3",
		"sallyport gateway devel 0201975ff3a1 go1.26.8 linux/amd64": "devel 0201975ff3a1",
		"sallyport gateway v0.0.0-20261201 go1.27rc1 linux/arm64":   "v0.0.0-20261201",
		"v1": "v1",
		"":   "",
	} {
		if got := shortVersion(version); got != want {
			t.Errorf("%q: got %q, want %q", version, got, want)
		}
	}
}

func TestWrap(t *testing.T) {
	word := strings.Repeat("x", 30)
	for _, tt := range []struct{ in, want string }{
		{"short\n", "short\n"},
		{"trailing  \n\nblank\n", "trailing\n\nblank\n"},
		{word + "  " + word + "  " + word + "\n", word + "  " + word + "\n    " + word + "\n"},
		{strings.Repeat("y", 200) + "\n", strings.Repeat("y", 80) + "\n    " + strings.Repeat("y", 76) + "\n    " + strings.Repeat("y", 44) + "\n"},
		{strings.Repeat("ä", 80) + "\n", strings.Repeat("ä", 80) + "\n"},
	} {
		got := wrap(tt.in)
		if got != tt.want {
			t.Errorf("%q\n got %q\nwant %q", tt.in, got, tt.want)
		}
		for line := range strings.Lines(got) {
			if utf8.RuneCountInString(line) > tableWidth+1 {
				t.Errorf("%q is too wide", line)
			}
		}
	}
}
