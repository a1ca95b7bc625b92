# Everything a developer does here is one of these. Each installs what it needs
# with apt when run as root, and otherwise says what is missing.

GO ?= go

build:
	$(GO) build -trimpath -o bin/ ./cmd/...

demo: build
	bin/gateway demo

# -count=1: tests run programs that they build, of which the test cache knows
# nothing.
test: build
	scripts/need openssh-client openssh-server openssh-sftp-server rsync git xauth socat procps perl-base python3-paramiko asciinema
	scripts/plain $(GO) test -count=1 ./...

race: build
	scripts/need openssh-client openssh-server openssh-sftp-server rsync git xauth socat procps perl-base python3-paramiko asciinema
	scripts/plain $(GO) test -count=1 -race ./...

interop: build
	scripts/need $$(cat interop/packages.txt)
	scripts/plain interop/run

# Ten minutes of it are 2,000 idle connections; ARGS=-quick is a short one.
bench:
	scripts/need openssh-client openssh-server
	scripts/plain $(GO) run ./bench $(ARGS)

# Six minutes; FUZZTIME=5m is a night. The seeds are run by test as well.
fuzz:
	scripts/fuzz $(FUZZTIME)

lint:
	@test -z "$$(gofmt -l .)" || { gofmt -l .; echo "run gofmt -w on these"; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	scripts/vulncheck

.PHONY: build demo test race interop bench fuzz lint
