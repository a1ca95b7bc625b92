package main

import (
	"github.com/rogpeppe/go-internal/testscript"
)

func (w *world) attack(ts *testscript.TestScript, args []string) { ts.Fatalf("no attack %v", args) }
