// The first process of the emulated machine: runs /selftest with what follows `selftest` on the kernel's command
// line, prints how it ended, and asks the emulator to stop.
#include <stdio.h>
#include <string.h>
#include <sys/io.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

int main(int, char** arguments) {
    while (*arguments && strcmp(*arguments, "selftest")) ++arguments;  // before it: words unknown to the kernel
    const pid_t child = *arguments ? fork() : -1;
    if (child == 0) {
        execv("/selftest", arguments);
        perror("/selftest");
        _exit(126);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child) {
        printf("halve-init: cannot run /selftest\n");
    } else if (WIFSIGNALED(status)) {
        printf("halve-init: signal %d (%s)\n", WTERMSIG(status), strsignal(WTERMSIG(status)));
    } else {
        printf("halve-init: exit %d\n", WEXITSTATUS(status));
    }
    fflush(stdout);
    tcdrain(STDOUT_FILENO);
    usleep(20000);                                   // what the serial port still holds
    if (ioperm(0, 65535, 1) == 0 || iopl(3) == 0) {  // Bochs stops when this word is written to port 0x8900
        for (const char* letter = "Shutdown"; *letter; ++letter) outb(static_cast<unsigned char>(*letter), 0x8900);
    }
    for (;;) pause();
}
