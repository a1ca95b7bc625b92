package agent

import (
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	Become() // if it was started for that
	os.Exit(m.Run())
}
