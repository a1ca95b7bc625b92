package relay

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
)

// TestWindowGrace has peers exceed their windows by a tenth, and then by a byte more.
func TestWindowGrace(t *testing.T) {
	grace := strings.Repeat("x", 100) // of the client's window of 1000 bytes
	half := strings.Repeat("x", 500)
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.session()
		j.bastion.send(data(0, half), data(0, half), data(0, grace))
		j.client.want("the part within the window", data(40, half), data(40, half))
		j.client.send(adjust(0, 150))
		j.client.want("the rest", data(40, grace))
		j.bastion.want("bastion", adjust(70, 150))
		j.bastion.send(data(0, grace), data(0, strings.Repeat("x", 50)))
		j.client.want("client", data(40, strings.Repeat("x", 50)))
		j.bastion.send(data(0, strings.Repeat("x", 51)))
		<-j.done
		if j.bastion.said != "data beyond the window or the maximum packet size" {
			t.Errorf("disconnected with %q", j.bastion.said)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		j := join(t, permitAll())
		defer j.end()
		j.session() // whose bastion grants 8192 bytes
		full := strings.Repeat("x", 700)
		j.client.send(slices.Repeat([][]byte{data(0, full)}, 12)...)
		j.bastion.want("within the window and the grace", slices.Repeat([][]byte{data(70, full)}, 12)...)
		j.client.send(data(0, full))
		<-j.done
		if j.client.said != "data beyond the window or the maximum packet size" {
			t.Errorf("disconnected with %q", j.client.said)
		}
	})
}
