/* One end of a connection by AF_VSOCK (vsock(7)), for a guest: what it reads it writes to the other
 * end, until there is no more, and what comes from there it prints. */
#include <errno.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int fail(const char *what)
{
	perror(what);
	return 1;
}

static int pump(int socket)
{
	static char in[1 << 16], out[1 << 16];
	size_t length = 0, at = 0;
	int reads = 1, gives = 1;

	while (reads || gives || length) {
		struct pollfd fds[] = {
			{ .fd = gives && !length ? 0 : -1, .events = POLLIN },
			{ .fd = socket, .events = (reads ? POLLIN : 0) | (length ? POLLOUT : 0) },
		};
		ssize_t n;

		if (!fds[1].events)
			fds[1].fd = -1;
		if (poll(fds, 2, -1) < 0)
			return fail("poll");
		if (fds[0].revents) {
			if ((n = read(0, out, sizeof out)) < 0)
				return fail("read");
			length = n, at = 0;
			if (!n && (gives = 0, shutdown(socket, SHUT_WR) < 0))
				return fail("shutdown");
		}
		if (fds[1].revents & (POLLIN | POLLHUP | POLLERR) && reads) {
			n = recv(socket, in, sizeof in, MSG_DONTWAIT);
			if (n < 0 && errno != EAGAIN)
				return fail("recv");
			reads = n != 0;
			for (ssize_t done = 0, m; done < n; done += m)
				if ((m = write(1, in + done, n - done)) < 0)
					return fail("write");
		}
		if (fds[1].revents & POLLOUT && length) {
			n = send(socket, out + at, length, MSG_DONTWAIT | MSG_NOSIGNAL);
			if (n < 0 && errno != EAGAIN)
				return fail("send");
			if (n > 0)
				at += n, length -= n;
		}
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST };
	int kind = argc > 1 && !strcmp(argv[1], "datagram") ? SOCK_DGRAM : SOCK_STREAM;
	int s = socket(AF_VSOCK, kind, 0);

	if (argc < 3 || s < 0)
		return fail("socket");
	address.svm_port = strtoul(argv[2], NULL, 0);
	if (argc > 3) { /* bytes of each ring */
		unsigned long long size = strtoull(argv[3], NULL, 0);

		if (setsockopt(s, AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, &size, sizeof size) < 0)
			return fail("setsockopt");
	}
	if (kind == SOCK_DGRAM)
		return sendto(s, "x", 1, 0, (void *)&address, sizeof address) < 0 ? fail("sendto") : 0;
	if (!strcmp(argv[1], "listen")) {
		address.svm_cid = VMADDR_CID_ANY;
		if (bind(s, (void *)&address, sizeof address) < 0 || listen(s, 8) < 0)
			return fail("listen");
		fputs("listening\n", stderr);
		if ((s = accept(s, NULL, NULL)) < 0)
			return fail("accept");
	} else if (connect(s, (void *)&address, sizeof address) < 0) {
		return fail("connect");
	}
	return pump(s);
}
