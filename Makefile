# The tasks of a developer. Each installs the Debian packages that it needs when it
# is run as root, and otherwise lists those that are missing.

GO ?= go
GOTEST ?= $(GO) test ./...

TEST_PACKAGES = openssh-client openssh-server openssh-sftp-server rsync git xauth \
	socat procps perl-base python3-paramiko zbar-tools asciinema iproute2 \
	redis-server redis-tools zsh fish libnss-extrausers nodejs=node npm=npm curl \
	systemd=systemd-socket-activate

IMAGE_PACKAGES = buildah podman crun mmdebstrap jq curl git iproute2 openssh-client rsync python3-minimal xauth

build:
	@scripts/go-version $(GO)
	$(GO) build -trimpath -o bin/ ./cmd/...

demo: build
	@scripts/apt-require openssh-client=ssh
	bin/gateway demo

# -count=1, because tests build and run programs that the test cache does not track.
# -timeout for slow machines: the default of ten minutes is for one package.
test: build
	scripts/apt-require $(TEST_PACKAGES)
	scripts/clean-home $(GOTEST) -count=1 -timeout 30m
	CGO_ENABLED=0 scripts/clean-home $(GO) test -count=1 ./internal/account

race: build
	scripts/apt-require $(TEST_PACKAGES)
	scripts/clean-home $(GOTEST) -count=1 -race -timeout 30m

# OpenSSH's regress suite and other clients against the gateway.
interop: build
	scripts/apt-require $$(cat interop/packages.txt)
	scripts/clean-home interop/run $(ARGS)

# Three gateways behind haproxy, under load, while they are killed, paused, drained and
# cut off, for FLEETTIME (default 10m); see docs/reliability.md.
fleet: build
	scripts/apt-require haproxy iptables iproute2 openssh-client nodejs=node npm=npm python3-venv
	$(GO) build -trimpath -o bin/ ./interop/fleet
	scripts/clean-home bin/fleet -time $(or $(FLEETTIME),10m) $(ARGS)

# Linters and tests of deploy. Some need root, and some terraform, which is not in Debian;
# without, the others run.
deploy-check:
	scripts/apt-require curl haproxy iproute2 jq openssh-client prometheus=promtool python3-venv
	deploy/check/run

# Measures, and compares with docs/performance.json. Without ARGS it also writes that
# file, and takes half an hour, ten minutes of it for 10,000 idle connections;
# ARGS=-quick is a short run.
bench:
	scripts/apt-require openssh-client openssh-server
	scripts/clean-home $(GO) run ./bench -compare docs/performance.json $(if $(ARGS),,-json docs/performance.json) $(ARGS)

# Builds the images without a container engine, and runs them: bastions of each kind, for
# users of a gateway in its own container. Needs root. See docs/images.md.
images:
	scripts/apt-require $(IMAGE_PACKAGES)
	images/build
	images/test

# Fuzzes every parser of input from outside, each for FUZZTIME (default 10s).
fuzz:
	scripts/fuzz $(FUZZTIME)

# The deb and rpm packages of this machine's architecture, in bin/packages, tested in a
# container. Needs root.
packages:
	@scripts/go-version $(GO)
	scripts/apt-require binutils=readelf lintian man-db=man mandoc mmdebstrap openssh-client=ssh \
		rpm systemd=systemd-analyze systemd-container
	rm -rf bin/packages
	GO=$(GO) packaging/build bin/packages $$(dpkg --print-architecture)
	GO=$(GO) packaging/test bin/packages

# All artefacts of a release, for both architectures, in bin/release. Those that "make
# images" has built of the same commit are included. With SIGN_KEY=FILE, an SSH key signs
# the checksums. See docs/install.md.
release:
	@scripts/go-version $(GO)
	scripts/apt-require openssh-client=ssh-keygen
	GO=$(GO) SIGN_KEY=$(SIGN_KEY) packaging/release bin/release
	GO=$(GO) packaging/test-release bin/release

# The build for arm64 has the flags of packages and images, which then find it in Go's
# cache.
lint:
	@test -z "$$(gofmt -l .)" || { gofmt -l .; echo "run gofmt -w on these"; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	CGO_ENABLED=0 GOARCH=arm64 $(GO) build -trimpath -o /dev/null ./cmd/...
	$(GO) run ./scripts/words
	scripts/vulncheck

.PHONY: build demo test race interop fleet deploy-check bench images fuzz packages release lint
