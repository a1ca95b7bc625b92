package agent

import (
	"os"
	"testing"

	"github.com/sallyport-ssh/sallyport/internal/become"
)

func TestMain(m *testing.M) {
	become.Main()
	os.Exit(m.Run())
}
