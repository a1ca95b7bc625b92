package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestCount(t *testing.T) {
	tests := []struct {
		name, path, data string
		count, words     int
	}{
		{"go", "a.go", "//go:build linux\n\n// F is what it is.\nfunc F(who string) { /* Whoever\nis */ _ = \"what\" }\n", 2, 7},
		{"go by two", "a_test.go", "package a\n\n// Who's that, and who knows whatever?\n", 3, 6},
		{"markdown", "a.md", "# What\n\nSee `who` and\n\n```\nwhat who\n```\n\nthe end.\n", 1, 5},
		{"shell", "run", "#!/bin/sh who\n# Whom it may concern\necho $# what # to whom\n", 2, 6},
		{"txtar", "a.txtar", "# a user\nexec ssh who@host\n", 0, 2},
		{"c", "a.c", "/* what\n who */ int who; // whom\nint whom; // who knows\n", 3, 4},
		{"longer words", "a.yaml", "a: b # somewhat whole whose somebody\n", 0, 4},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := count(tt.path, []byte(tt.data))
			if f == nil {
				t.Fatal("the kind of the file is unknown")
			}
			if f.count != tt.count || f.words != tt.words {
				t.Errorf("got %d of %d words, want %d of %d; lines: %v", f.count, f.words, tt.count, tt.words, f.lines)
			}
		})
	}
	if f := count("a.json", []byte(`{"what": 1}`)); f != nil {
		t.Errorf("a file without comments was counted: %+v", f)
	}
}

func TestReport(t *testing.T) {
	files := []*file{
		{path: "good", count: 3, words: 1000},
		{path: "short", count: 1, words: 10},
		{path: "bad", count: 4, words: 1000, lines: []line{{7, "is what it is"}}},
		{path: "worse", count: 2, words: 10},
		{path: "none", words: 10},
	}
	var out bytes.Buffer
	if !report(&out, files, false, true) {
		t.Error("two files above the limit did not fail")
	}
	got := strings.Fields(out.String())
	if got[0] != "worse" || !strings.Contains(out.String(), "bad:7: is what it is") || strings.Contains(out.String(), "good") || strings.Contains(out.String(), "short") {
		t.Errorf("the report is\n%s", out.String())
	}
	out.Reset()
	report(&out, files, true, false)
	if !strings.Contains(out.String(), "good") || !strings.Contains(out.String(), "short") || strings.Contains(out.String(), "none") {
		t.Errorf("the report of all files is\n%s", out.String())
	}
	if report(&out, files[:0], false, false) {
		t.Error("no files failed")
	}
}
