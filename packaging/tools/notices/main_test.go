package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestNotices(t *testing.T) {
	text, err := notices([]string{"../manpages"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"the Go standard library LICENSE\n", "github.com/cpuguy83/go-md2man/v2 v2.", "The MIT License", "github.com/russross/blackfriday/v2 v2."} {
		if !strings.Contains(string(text), want) {
			t.Errorf("there is no %q", want)
		}
	}
	if strings.Contains(string(text), "sallyport") || strings.Contains(string(text), "nfpm") {
		t.Error("the main module, or one that is not linked, is listed")
	}
}

func TestWithoutLicence(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "README"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := licencesOf(module{Path: "example.com/m", Dir: dir}); err == nil || !strings.Contains(err.Error(), "example.com/m") {
		t.Errorf("the error is %v", err)
	}
}
