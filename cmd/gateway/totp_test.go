package main

import (
	"image"
	"image/color"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestDrawQR has zbarimg read the code off a picture of a dark and of a light
// terminal.
func TestDrawQR(t *testing.T) {
	if _, err := exec.LookPath("zbarimg"); err != nil {
		t.Skip("zbarimg (zbar-tools) is not installed")
	}
	const text = "otpauth://totp/Sallyport:first.last@example.com?issuer=Sallyport&secret=GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ"
	var out strings.Builder
	if err := drawQR(&out, text); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	if n := len(lines); n > 30 {
		t.Errorf("the code has %d lines", n)
	}
	for name, dark := range map[string]bool{"dark": true, "light": false} {
		path := filepath.Join(t.TempDir(), name+".png")
		file, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := png.Encode(file, screenshot(t, lines, dark)); err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
		got, err := exec.Command("zbarimg", "--quiet", "--raw", path).Output()
		if err != nil || strings.TrimSpace(string(got)) != text {
			t.Errorf("on a %s terminal: %q, %v", name, got, err)
		}
	}
}

// screenshot is a terminal with these lines, with the sequences that drawQR uses:
// two colours, half blocks, and the terminal's own colours elsewhere.
func screenshot(t *testing.T, lines []string, dark bool) image.Image {
	t.Helper()
	const columns, margin, cell = 80, 2, 8 // cells are 8 pixels wide, and 16 high
	own, text := color.Gray{Y: 255}, color.Gray{Y: 0}
	if dark {
		own, text = color.Gray{Y: 30}, color.Gray{Y: 220}
	}
	shot := image.NewGray(image.Rect(0, 0, columns*cell, (len(lines)+2*margin)*2*cell))
	for i := range shot.Pix {
		shot.Pix[i] = own.Y
	}
	fill := func(x, y int, c color.Gray) {
		for i := range cell {
			for j := range cell {
				shot.SetGray(x*cell+i, y*cell+j, c)
			}
		}
	}
	for row, line := range lines {
		front, back := text, own
		column := 0
		for line != "" {
			if rest, ok := strings.CutPrefix(line, "\x1b[38;5;16;48;5;231m"); ok {
				front, back, line = color.Gray{Y: 0}, color.Gray{Y: 255}, rest
				continue
			}
			if rest, ok := strings.CutPrefix(line, "\x1b[0m"); ok {
				front, back, line = text, own, rest
				continue
			}
			r := []rune(line)[0]
			line = line[len(string(r)):]
			top, bottom := back, back
			switch r {
			case '█':
				top, bottom = front, front
			case '▀':
				top = front
			case '▄':
				bottom = front
			case ' ':
			default:
				t.Fatalf("the terminal does not know %q", r)
			}
			if column == columns {
				t.Fatal("wider than 80 columns")
			}
			fill(column, 2*(row+margin), top)
			fill(column, 2*(row+margin)+1, bottom)
			column++
		}
	}
	return shot
}
