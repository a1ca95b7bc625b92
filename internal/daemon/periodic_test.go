package daemon

import (
	"errors"
	"strings"
	"testing"
)

func TestSafely(t *testing.T) {
	failed := errors.New("failed")
	if err := safely(func() error { return failed }); err != failed {
		t.Errorf("an error became %v", err)
	}
	if err := safely(func() error { panic("boom") }); err == nil || !strings.Contains(err.Error(), "boom") {
		t.Errorf("a panic became %v", err)
	}
}
