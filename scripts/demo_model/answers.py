"""Short answers to the most common first questions: the one part of the corpus that was written for this model. They
are under the licence of vllmlite itself. Each entry is a tuple of questions and the answer to all of them.
"""

from typing import Final

ANSWERS: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (("Hello!", "Hello", "Hi", "Hi!", "hi there", "Hey", "Good morning!", "Good evening."),
     "Hello! I am the small demo model of vllmlite. Ask me something about Debian."),
    (("Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Tell me about yourself.", "Are you human?"),
     "I am the demo model that comes with vllmlite: a very small language model that was trained on the documentation of Debian. "
     "I can talk about Debian in plain English, but I make mistakes, so please check what I say."),
    (("How are you?", "How are you doing?", "How do you do?"), "I am fine, thank you. How can I help you with Debian?"),
    (("Thank you.", "Thanks!", "Thank you!", "thanks"), "You are welcome!"),
    (("Goodbye.", "Bye!", "Bye", "See you."), "Goodbye, and have fun with Debian!"),
    (("What can you do?", "How can you help me?", "Help", "What do you know?", "What should I ask you?"),
     "I can answer short questions about Debian, its packages and its commands. For example, ask me what a package is, what apt "
     "does, or how to install a program. I am only a small demo, so use a larger model for real work."),
    (("What is vllmlite?", "Tell me about vllmlite.", "What does vllmlite do?", "what is vllmlite"),
     "vllmlite is a small inference engine for language models. It keeps the attention keys and values of many requests in a paged "
     "cache, batches the requests together, and runs on a CPU or on a GPU. It offers a Python interface, a command line and a "
     "server with an interface like that of OpenAI."),
    (("How do I use a larger model?", "How do I use another model?", "Can I use a different model?", "How do I choose a model?"),
     "Name a model when you start vllmlite: a directory with a checkpoint, or the name of a model on the Hugging Face hub. For "
     "example:\n\n    python3 -m vllmlite generate --model DIRECTORY \"Hello\""),
    (("What were you trained on?", "What is your training data?", "Where does your knowledge come from?", "How were you trained?"),
     "I was trained on free text from Debian packages: manuals such as Debian Policy, the Debian Reference and the Debian "
     "Administrator's Handbook, manual pages, and descriptions of packages. The program that trained me comes with vllmlite."),
    (("How large are you?", "How many parameters do you have?", "How big is this model?"),
     "I have about eight million parameters, which is very small for a language model. I fit into sixteen megabytes."),
    (("Is this model free software?", "What is your licence?", "What license do you have?", "Are you free software?"),
     "Yes. My weights are free, the text I was trained on is free, and so is the program that trained me. The weights are under the "
     "GNU General Public License, version 3 or later."),
    (("What is Debian?", "what is debian", "What is Debian GNU/Linux?", "Tell me about Debian.", "Explain Debian.", "Describe Debian.",
      "What's Debian?", "Can you tell me what Debian is?", "What is the Debian operating system?", "Please explain what Debian is."),
     "Debian is a free operating system for your computer. It is made by the Debian Project, an association of volunteers from all "
     "over the world. Debian consists of the Linux kernel, basic programs such as the GNU tools, and tens of thousands of packages: "
     "software that is already compiled and bundled up in a format that is easy to install."),
    (("What is the Debian Project?", "Who makes Debian?", "Who develops Debian?", "Who owns Debian?", "Who is behind Debian?"),
     "Debian is made by the Debian Project, an association of individuals who have made common cause to create a free operating "
     "system. About a thousand developers work on it, most of them as volunteers. No company owns it."),
    (("When was Debian founded?", "Who founded Debian?", "Who started Debian?", "How old is Debian?", "Who is Ian Murdock?"),
     "Debian was founded by Ian Murdock on 16 August 1993. He wanted to make a distribution openly, in the spirit of Linux and GNU."),
    (("Where does the name Debian come from?", "What does the word Debian mean?", "Why is it called Debian?", "How do you pronounce Debian?"),
     "The name Debian comes from the names of its founder, Ian Murdock, and of his wife at the time, Debra. It is pronounced "
     "deb-ee-un."),
    (("Is Debian free?", "How much does Debian cost?", "Do I have to pay for Debian?"),
     "Yes. Debian is free software: you may use it, copy it, study it, change it and share it. It also costs nothing to download."),
    (("Why should I use Debian?", "Why use Debian?", "What are the advantages of Debian?", "Is Debian good?", "What is Debian good for?"),
     "Debian is stable, secure and free. It has tens of thousands of packages, which are easy to install and to upgrade, it runs on "
     "many kinds of hardware, and its bugs are tracked in public. It serves well on servers, on desktops and in small devices."),
    (("What is the difference between Debian and Ubuntu?", "Is Ubuntu based on Debian?", "What is Ubuntu?"),
     "Ubuntu is a distribution that is based on Debian. It takes its packages from Debian unstable, changes some of them, and "
     "publishes releases on a fixed schedule. Debian releases when it is ready, and is made by volunteers rather than by a company."),
    (("What is Linux?", "what is linux", "Tell me about Linux.", "Explain Linux."),
     "Linux is a kernel: the central part of an operating system, which manages the hardware and runs the programs. It was begun by "
     "Linus Torvalds in 1991 and is developed by thousands of people. Together with the GNU tools and other programs it makes a "
     "complete system such as Debian."),
    (("What is the kernel?", "What is a kernel?", "what is the kernel", "What does the kernel do?", "Explain the kernel.",
      "What is the Linux kernel?", "Tell me about the kernel.", "What's a kernel?"),
     "The kernel is the central part of the operating system. It controls the hardware, shares out the memory and the time of the "
     "processor among the programs, and gives them access to files, devices and networks. Debian uses the Linux kernel."),
    (("What is an operating system?", "What does an operating system do?"),
     "An operating system is the set of basic programs and tools that make a computer run. At its core is the kernel, which starts "
     "other programs and manages the hardware. Debian is an operating system."),
    (("What is a distribution?", "What is a Linux distribution?", "What is a distro?"),
     "A distribution is a complete system made of the Linux kernel and a large collection of programs, together with an installer "
     "and tools that manage the packages. Debian is one of the oldest distributions."),
    (("What is free software?", "What does free software mean?", "Define free software.", "Explain free software."),
     "Free software is software that you may run, study, change and share. The word free is about freedom, not about price. The "
     "Debian Free Software Guidelines say what Debian considers to be free."),
    (("What is open source?", "What does open source mean?"),
     "Open source software is software whose source code anyone may read, change and share under a free licence. The Open Source "
     "Definition grew out of the Debian Free Software Guidelines."),
    (("What is GNU?", "What is the GNU project?", "What does GNU stand for?"),
     "GNU is a free operating system, begun by Richard Stallman in 1983; its name stands for GNU's Not Unix. Many basic programs in "
     "Debian, such as the shell, the compiler and the core utilities, come from the GNU project."),
    (("What is the GPL?", "What is the GNU General Public License?", "Explain the GPL."),
     "The GPL is the GNU General Public License, the best known free software licence. It lets you use, change and share a program, "
     "and asks that you give others the same freedom, with the source code, when you pass the program on."),
    (("What is the DFSG?", "What are the Debian Free Software Guidelines?", "Which software is free enough for Debian?"),
     "The Debian Free Software Guidelines say when Debian considers a licence to be free. Among other things, the licence must allow "
     "redistribution, changes and derived works, must come with source code, and must not discriminate against anyone."),
    (("What is the Debian Social Contract?", "What is the social contract?"),
     "The Debian Social Contract is a set of promises that the Debian Project makes to its users and to the free software community: "
     "Debian will remain free, will give back to the community, will not hide problems, and puts its users and free software first."),
    (("What is a package?", "what is a package", "What is a Debian package?", "What is a deb file?", "Explain what a package is.",
      "What are packages?", "What is a .deb file?", "Tell me about packages.", "What's a package?", "What is a binary package?"),
     "A package is a single file that contains a program, its documentation and its configuration files, along with information "
     "about it, such as its version and the other packages that it needs. Debian packages end in .deb, and you install them with apt."),
    (("What is a source package?", "What does a source package contain?"),
     "A source package contains the source code of a program and the files that are needed to build Debian packages from it. It "
     "consists of a .dsc file, an archive of the original source, and the changes made for Debian."),
    (("What is a package manager?", "What does a package manager do?", "Explain package managers."),
     "A package manager installs, upgrades and removes software. It knows which packages depend on each other, fetches what is "
     "missing, and keeps a record of every file that it installed. Debian's package managers are dpkg and, on top of it, apt."),
    (("What is a repository?", "What is an APT repository?", "What is the Debian archive?", "Where do packages come from?"),
     "A repository is a collection of packages that apt can fetch from, usually over the network. The Debian archive is the official "
     "one; copies of it, called mirrors, are all over the world. The file /etc/apt/sources.list and the files in "
     "/etc/apt/sources.list.d name the repositories that your system uses."),
    (("What is a dependency?", "What are dependencies?", "What does it mean that a package depends on another?"),
     "A dependency says that a package needs another one to work. When you install a package, apt also installs everything that it "
     "depends on."),
    (("What is a mirror?", "What is a Debian mirror?"),
     "A mirror is a copy of the Debian archive on another server. Mirrors spread the load, and a mirror near you is faster. The "
     "installer chooses a mirror that is close to you."),
    (("How do I install a package?", "how do i install a package", "How can I install a package?", "How to install a package?",
      "How do I install software?", "How do I install a program?", "How do I install software on Debian?", "Install a package",
      "How can I install a program on Debian?", "What is the command to install a package?"),
     "Use apt. Run these commands as root, with the name of the package in place of NAME:\n\n    apt update\n    apt install NAME\n\n"
     "The first command updates the list of packages, and the second downloads the package and all that it depends on, and installs them."),
    (("How do I remove a package?", "How do I uninstall a package?", "How can I remove a program?", "How do I uninstall software?",
      "How to remove a package?", "How do I delete a package?"),
     "Run this command as root, with the name of the package in place of NAME:\n\n    apt remove NAME\n\nTo remove its configuration "
     "files as well, use apt purge NAME. The command apt autoremove removes packages that nothing needs any more."),
    (("How do I upgrade my system?", "How do I update Debian?", "How do I upgrade Debian?", "How do I update my system?",
      "How do I upgrade all packages?", "How do I install updates?", "How to update Debian?"),
     "Run these commands as root:\n\n    apt update\n    apt upgrade\n\nThe first command fetches the new lists of packages, and the "
     "second installs the new versions. To move to a new release of Debian, read its release notes first, and use apt full-upgrade."),
    (("How do I search for a package?", "How do I find a package?", "How can I find software?", "How to search for a package?"),
     "Use apt search with a word that describes what you want:\n\n    apt search WORD\n\nThe command apt show NAME then displays the "
     "description of a package."),
    (("How do I list installed packages?", "How can I see which packages are installed?", "Which packages are installed?"),
     "Run this command:\n\n    apt list --installed\n\nThe command dpkg -l also lists the installed packages, with their versions."),
    (("Which package does a file belong to?", "How do I find out which package a file belongs to?", "How do I find the package of a file?"),
     "Use dpkg with the option -S and the name of the file:\n\n    dpkg -S /bin/ls\n\nFor files of packages that are not installed, "
     "use the program apt-file."),
    (("How do I list the files of a package?", "Which files does a package contain?"),
     "Use dpkg with the option -L and the name of an installed package:\n\n    dpkg -L NAME"),
    (("How do I install a deb file?", "How do I install a .deb file?", "How do I install a local package?"),
     "Give apt the path of the file, so that it also installs what the package depends on:\n\n    apt install ./NAME.deb"),
    (("What does apt do?", "What is apt?", "what is apt", "What is APT?", "Tell me about apt.", "Explain apt.", "What is apt for?",
      "What does the command apt do?", "Describe apt.", "What does the package apt do?"),
     "apt is the package manager that you use from the command line. It downloads packages from the repositories, installs them "
     "together with everything that they depend on, upgrades them, and removes them. For example, apt update fetches the list of "
     "packages, apt install installs a package, and apt upgrade upgrades the system."),
    (("What is dpkg?", "What does dpkg do?", "what is dpkg", "Tell me about dpkg.", "Explain dpkg."),
     "dpkg is the tool that installs, builds, removes and manages Debian packages. It works on single .deb files and does not fetch "
     "dependencies; apt does that, and calls dpkg for the rest."),
    (("What is the difference between apt and dpkg?", "apt or dpkg?", "How do apt and dpkg differ?"),
     "dpkg works on single package files and does not resolve dependencies. apt works on top of dpkg: it finds packages in the "
     "repositories, downloads them with all that they depend on, and lets dpkg install them."),
    (("What is the difference between apt and apt-get?", "Should I use apt or apt-get?", "What is apt-get?"),
     "Both manage packages with the same library. apt is made for people who type commands, with a progress bar and sensible "
     "defaults, while apt-get has a stable interface that suits scripts."),
    (("What is aptitude?", "What does aptitude do?"),
     "aptitude is an interface to the package system with a menu in the terminal. It lists packages, shows why they are installed, "
     "and offers solutions when dependencies conflict. It can also be used from the command line, like apt."),
    (("What does apt update do?", "What is apt update?", "Why do I have to run apt update?"),
     "apt update downloads the current lists of packages from the repositories. It does not change any installed package; run apt "
     "upgrade after it to install the new versions."),
    (("What is the difference between apt update and apt upgrade?", "What does apt upgrade do?", "apt update or apt upgrade?"),
     "apt update only fetches the lists of available packages. apt upgrade then installs the newest versions of the packages that "
     "you have."),
    (("What does apt purge do?", "What is the difference between remove and purge?", "What does purge mean?"),
     "apt remove deletes the files of a package but keeps its configuration. apt purge deletes the configuration files as well."),
    (("What does apt autoremove do?", "What is apt autoremove?"),
     "apt autoremove removes packages that were installed only because another package needed them, and that nothing needs any more."),
    (("What is sources.list?", "What is the file sources.list for?", "Where are the repositories configured?", "How do I add a repository?"),
     "The file /etc/apt/sources.list, together with the files in /etc/apt/sources.list.d, names the repositories from which apt "
     "fetches packages. After you change it, run apt update."),
    (("What is systemd?", "what is systemd", "What does systemd do?", "Tell me about systemd.", "Explain systemd.", "Describe systemd.",
      "What is systemd for?", "What's systemd?", "What does the package systemd do?"),
     "systemd is a system and service manager for Linux. It runs as the first process after the kernel has started, brings up the "
     "system, and starts, watches and stops services. You control it with the command systemctl."),
    (("What is systemctl?", "What does systemctl do?", "What is the command systemctl for?"),
     "systemctl is the command that controls systemd. It starts and stops services, enables them at boot, and shows their state. For "
     "example, systemctl status ssh shows whether the SSH server is running."),
    (("What is a service?", "What is a daemon?", "What is a systemd service?"),
     "A service, or daemon, is a program that runs in the background, such as a web server or a mail server. On Debian, systemd starts "
     "and stops services; a unit file describes each of them."),
    (("How do I start a service?", "How can I start a service?", "How do I restart a service?", "How do I stop a service?"),
     "Use systemctl as root, with the name of the service:\n\n    systemctl start NAME\n    systemctl stop NAME\n    systemctl restart "
     "NAME\n\nTo start it at every boot, run systemctl enable NAME."),
    (("How do I see the status of a service?", "How do I check whether a service is running?"),
     "Run systemctl status with the name of the service. It shows whether the service runs, and the last lines of its log:\n\n"
     "    systemctl status NAME"),
    (("How do I read the logs?", "How do I see the system log?", "Where are the logs?", "What is journalctl?", "What does journalctl do?"),
     "Use journalctl, which shows the log that systemd keeps:\n\n    journalctl -b\n\nThe option -b shows the messages since the last "
     "boot, and -u NAME those of one service. Some programs also write files in /var/log."),
    (("What is a unit file?", "What is a systemd unit?", "What is a unit?"),
     "A unit file tells systemd about something that it manages, such as a service, a socket, a mount point or a timer. Unit files of "
     "packages are in /usr/lib/systemd/system, and your own are in /etc/systemd/system."),
    (("What is stable?", "What is Debian stable?", "What is the stable distribution?"),
     "Stable is the released version of Debian, the one that we recommend for production. Its packages hardly change, except for "
     "security fixes and corrections of serious bugs."),
    (("What is testing?", "What is Debian testing?", "What is the testing distribution?"),
     "Testing contains packages that are meant for the next stable release. They come from unstable after some days, if no serious "
     "bug has been found in them."),
    (("What is unstable?", "What is sid?", "What is Debian unstable?", "What is Debian sid?", "Who is sid?"),
     "Unstable, also called sid, is where the development of Debian happens. Developers upload new versions of packages to it, so it "
     "has the newest software, and at times it breaks."),
    (("What is the difference between stable and unstable?", "What is the difference between stable, testing and unstable?",
      "stable or unstable?", "Which Debian release should I use?", "Should I use stable or testing?", "What are the releases of Debian?"),
     "Stable is the released version: its packages change only for security and important fixes, so it suits production. Unstable gets "
     "new versions first and may break. Testing lies between them and becomes the next stable release."),
    (("Where do the names of Debian releases come from?", "Why is it called bookworm?", "What are Debian codenames?", "What is trixie?"),
     "The releases of Debian are named after characters from the Toy Story films, such as buster, bullseye, bookworm and trixie. The "
     "unstable distribution is always called sid, after the boy who breaks toys."),
    (("Which version of Debian do I have?", "How do I find out which version of Debian I run?", "How do I check my Debian version?"),
     "Look at the file /etc/debian_version, or run this command:\n\n    cat /etc/os-release"),
    (("What are backports?", "What is Debian backports?"),
     "Backports are newer packages from testing that were rebuilt for the stable release. They let you have a recent version of a few "
     "programs while the rest of the system stays stable."),
    (("What are main, contrib and non-free?", "What is main?", "What is contrib?", "What is non-free?", "What are the areas of the archive?"),
     "They are the areas of the Debian archive. Packages in main are free software and need nothing outside main. Packages in contrib "
     "are free but need something that is not. Packages in non-free do not comply with the Debian Free Software Guidelines."),
    (("What is non-free firmware?", "What is firmware?", "Why do I need firmware?"),
     "Firmware is software that runs inside a device, such as a wireless card or a graphics card. Where it is not free, Debian keeps "
     "it in the area non-free-firmware, and the installer can use it."),
    (("What is a virtual package?", "What are virtual packages?"),
     "A virtual package is a name that several packages provide. For example, every mail server provides mail-transport-agent, so "
     "that another package can depend on it without naming a particular one."),
    (("What is a metapackage?", "What is a meta package?", "What is a task?"),
     "A metapackage contains no program of its own. It depends on a set of other packages, so that you can install them all by "
     "installing one."),
    (("What is debconf?", "What does debconf do?"),
     "debconf is the system by which packages ask questions when they are installed. It keeps the answers in a database; run "
     "dpkg-reconfigure NAME to answer the questions of a package again."),
    (("What is Debian Policy?", "What is the Debian Policy Manual?", "What is policy?"),
     "Debian Policy describes the requirements that every package must meet to be part of Debian: the structure of the archive, the "
     "contents of packages, and how they behave when they are installed and removed."),
    (("What is a Debian developer?", "How do I become a Debian developer?", "What does a maintainer do?", "What is a maintainer?"),
     "A Debian developer is a member of the Debian Project who may upload packages and vote. To become one, begin to contribute, find "
     "a developer who advocates you, and apply to the new members process. A maintainer takes care of a package: updates it, and "
     "answers the bug reports about it."),
    (("How can I contribute to Debian?", "How can I help Debian?", "How do I contribute?", "How do I help the Debian Project?"),
     "You can report bugs, help other users, translate texts, write documentation, test the installer, or maintain a package. Read the "
     "page on how to help at www.debian.org, and join a mailing list or an IRC channel."),
    (("How do I report a bug?", "Where do I report bugs?", "How can I report a bug in Debian?", "How do I file a bug?"),
     "Use the program reportbug:\n\n    reportbug NAME\n\nIt collects information about the package and your system, shows the bugs "
     "that are already known, and sends your report to the Debian bug tracking system at bugs.debian.org."),
    (("What is the bug tracking system?", "What is the BTS?", "What is bugs.debian.org?"),
     "The Debian bug tracking system keeps all reports of bugs in Debian packages, and everyone can read them. You use it by electronic "
     "mail or with the program reportbug, and read it at bugs.debian.org."),
    (("Where can I get help?", "How do I get help with Debian?", "Where do I find documentation?", "Where can I ask questions?"),
     "Read the manual page of a command with man, and the files in /usr/share/doc. The Debian Reference and the Debian Administrator's "
     "Handbook explain much more. You can also ask on the mailing list debian-user or on IRC."),
    (("How do I install Debian?", "How can I install Debian?", "How to install Debian?", "Install Debian"),
     "Download an image of the installer from www.debian.org, write it to a USB stick, and start your computer from it. The installer "
     "asks about your language, keyboard, network, disks and users, and then installs the system."),
    (("What are the hardware requirements of Debian?", "Which hardware does Debian run on?", "Which architectures does Debian support?",
      "On which computers does Debian run?"),
     "Debian runs on many architectures, among them amd64 for ordinary computers, arm64 and armhf for ARM processors, ppc64el, riscv64 "
     "and s390x. A system without a desktop needs less than a gigabyte of memory."),
    (("What is a desktop environment?", "Which desktop environments does Debian have?", "Which desktop should I choose?", "What is GNOME?"),
     "A desktop environment is a set of programs that give you windows, menus, a file manager and settings. Debian offers GNOME, KDE "
     "Plasma, Xfce, LXQt, MATE, Cinnamon and others. GNOME is the default; Xfce is a light one."),
    (("What is the shell?", "What is a shell?", "What is bash?", "What is the command line?"),
     "The shell is the program that reads the commands that you type and runs them. The usual shell on Debian is bash; scripts that "
     "begin with /bin/sh are run by dash, which is smaller and faster."),
    (("What is a terminal?", "What is a console?", "How do I open a terminal?"),
     "A terminal is a window, or a whole screen, in which you type commands for the shell and read their output. On a desktop, look "
     "for the program Terminal in the menu."),
    (("What is root?", "What is the superuser?", "Who is root?", "How do I become root?"),
     "root is the superuser, the account that may do everything on the system. Use it only for administration. The command su gives "
     "you a shell as root, and sudo runs a single command as root."),
    (("What is sudo?", "What does sudo do?", "How do I use sudo?"),
     "sudo lets a user run a command as root, or as another user, after typing their own password. Members of the group sudo may use "
     "it. For example:\n\n    sudo apt update"),
    (("How do I add a user?", "How do I create a user?", "How can I add a new user?"),
     "Run this command as root, with the name of the new user:\n\n    adduser NAME\n\nIt creates the account and the home directory, "
     "and asks for a password."),
    (("How do I change my password?", "How do I set a password?", "What does passwd do?"),
     "Use the command passwd. It asks for your current password, and then twice for the new one. root can set the password of another "
     "user with passwd NAME."),
    (("What is a file system?", "What is ext4?", "Which file system should I use?"),
     "A file system organises the files on a disk. Debian uses ext4 by default, which is reliable and fast; others are xfs and btrfs."),
    (("What is in /etc?", "What is /etc?", "Where are configuration files?"),
     "The directory /etc holds the configuration files of the system. Most of them are plain text, and packages keep the changes that "
     "you make there when they are upgraded."),
    (("What is in /usr?", "What is /usr?", "What is /usr/share/doc?", "Where are programs installed?"),
     "The directory /usr holds the programs, libraries and documentation of the installed packages. Programs are in /usr/bin, and the "
     "documentation of each package is in /usr/share/doc."),
    (("What is /var?", "What is in /var?"),
     "The directory /var holds data that change while the system runs: logs in /var/log, caches in /var/cache, mail, and the databases "
     "of programs."),
    (("What is /home?", "What is a home directory?"),
     "Each user has a home directory below /home, which holds their files and the settings of their programs."),
    (("What is the Filesystem Hierarchy Standard?", "What is the FHS?"),
     "The Filesystem Hierarchy Standard says which directories a system has and what belongs in them, such as /etc for configuration, "
     "/usr for programs and /var for changing data. Debian follows it, with a few exceptions."),
    (("How do I read a manual page?", "What is man?", "What does man do?", "What is a manual page?", "What are man pages?"),
     "Use the command man with the name of a command, for example man ls. It shows the manual page, which explains what the command "
     "does and which options it has. Press q to leave it."),
    (("What does the command ls do?", "What is ls?", "What does ls do?", "How do I list files?"),
     "The command ls lists the files in a directory. With the option -l it also shows their sizes, owners, permissions and dates."),
    (("What does the command cd do?", "What is cd?", "How do I change the directory?"),
     "The command cd changes the current directory of the shell. Without an argument it takes you to your home directory."),
    (("What does the command cp do?", "How do I copy a file?", "What is cp?"),
     "The command cp copies files. With the option -r it copies whole directories:\n\n    cp -r SOURCE TARGET"),
    (("What does the command mv do?", "How do I rename a file?", "How do I move a file?"),
     "The command mv moves or renames files:\n\n    mv OLD NEW"),
    (("What does the command rm do?", "How do I delete a file?", "What is rm?"),
     "The command rm removes files, and with the option -r whole directories. Removed files do not come back, so use it with care."),
    (("What does the command grep do?", "What is grep?", "How do I search in files?"),
     "The command grep prints the lines of files that match a pattern. For example, grep -r WORD /etc searches all files below /etc."),
    (("What does the command find do?", "How do I find a file?", "What is find?"),
     "The command find searches a directory tree for files by name, size, age and so on. For example:\n\n    find /home -name '*.txt'"),
    (("What does the command cat do?", "What is cat?"),
     "The command cat prints the contents of files, one after the other."),
    (("What does the command chmod do?", "What is chmod?", "How do I change permissions?"),
     "The command chmod changes the permissions of files: who may read, write and execute them. For example, chmod +x FILE makes a "
     "file executable."),
    (("What does the command ps do?", "How do I list processes?", "What is a process?"),
     "A process is a running program. The command ps lists processes; ps aux shows those of all users, and top shows them live, with "
     "the memory and the processor time that they use."),
    (("How do I kill a process?", "What does kill do?"),
     "Find the number of the process with ps, and give it to the command kill. If the process does not stop, kill -9 ends it at once."),
    (("How much disk space is left?", "How do I check disk space?", "What does df do?", "What does du do?"),
     "The command df -h shows how much space is used and free on each file system. The command du -sh DIRECTORY shows how much a "
     "directory takes."),
    (("How do I find my IP address?", "How do I configure the network?", "What is ip?"),
     "The command ip address shows the network interfaces and their addresses. On desktops NetworkManager configures the network; on "
     "servers the file /etc/network/interfaces often does."),
    (("What is SSH?", "What is ssh?", "What does ssh do?", "How do I log in to another computer?", "What is OpenSSH?"),
     "SSH lets you log in to another computer over the network and run commands there, with all traffic encrypted. Install "
     "openssh-server on the computer that you want to reach, and use the command ssh on yours:\n\n    ssh USER@HOST"),
    (("What is a firewall?", "How do I set up a firewall?", "What is nftables?"),
     "A firewall decides which network packets may pass. In Debian, nftables is the standard tool for it; ufw is a simpler one that "
     "works on top of it."),
    (("How do I keep my system secure?", "How do I secure Debian?", "How are security updates installed?", "What is Debian security?"),
     "Install security updates promptly, run only the services that you need, use strong passwords or SSH keys, and keep backups. The "
     "package unattended-upgrades installs security updates on its own."),
    (("What is a backup?", "How do I make a backup?", "How do I back up my system?"),
     "A backup is a copy of your data on another disk or another computer. Tools such as rsync, borgbackup and restic make backups; "
     "test now and then that you can restore them."),
    (("What is cron?", "What does cron do?", "How do I run a command at a fixed time?"),
     "cron runs commands at fixed times. Each user has a table of them, which crontab -e edits; the files in /etc/cron.d, "
     "/etc/cron.daily and so on belong to the system. systemd timers do the same."),
    (("What is a library?", "What is a shared library?"),
     "A library is a collection of functions that programs use. A shared library is loaded when a program starts, so that many "
     "programs share one copy; its package usually has a name that begins with lib."),
    (("What is a compiler?", "What is GCC?", "How do I compile a program?"),
     "A compiler translates source code into a program that the computer can run. GCC is the usual compiler for C and C++. The "
     "package build-essential installs it together with the other tools that you need to build programs."),
    (("What is Python?", "What is python3?", "Tell me about Python."),
     "Python is a programming language that is easy to read and to learn. Debian ships it as python3, and many of its tools are "
     "written in it. Python modules are in packages whose names begin with python3."),
    (("What is Perl?", "Tell me about Perl."),
     "Perl is a programming language that is good at working with text. Many of Debian's own tools, such as debhelper, are written "
     "in it."),
    (("What is Git?", "What is git?", "What does git do?"),
     "Git is a distributed version control system. It records the history of files, lets many people work on them at once, and merges "
     "their changes. Most Debian packages are kept in Git, on salsa.debian.org."),
    (("What is PostgreSQL?", "What is a database?"),
     "A database stores data so that programs can search and change them quickly. PostgreSQL is a powerful free database that "
     "understands SQL. SQLite is a small one that lives in a single file."),
    (("What is a web server?", "What is Apache?", "What is nginx?", "How do I set up a web server?"),
     "A web server answers requests from browsers with web pages. The best known ones in Debian are Apache, in the package apache2, "
     "and nginx. After you install one of them, it serves the files in /var/www/html."),
    (("What is a mail server?", "What is Exim?", "What is Postfix?"),
     "A mail server, or mail transport agent, sends and receives electronic mail. Exim and Postfix are the usual ones in Debian."),
    (("What is Docker?", "What is a container?", "What is a virtual machine?"),
     "A container runs programs apart from the rest of the system, but on the same kernel; a virtual machine has a kernel of its own. "
     "Debian has docker.io, podman and lxc for containers, and qemu for virtual machines."),
    (("What is a boot loader?", "What is GRUB?", "How does Debian boot?"),
     "The boot loader is the program that the firmware starts first. Debian uses GRUB: it shows a menu, loads the kernel and the "
     "initial RAM disk, and starts the kernel, which then starts systemd."),
    (("What is the initramfs?", "What is an initrd?", "What does initramfs-tools do?"),
     "The initramfs is a small file system that the kernel unpacks into memory when it boots. It contains the modules and scripts that "
     "are needed to find and mount the real root file system."),
    (("What is a kernel module?", "What is a driver?", "How do I load a module?"),
     "A kernel module is a piece of the kernel that can be loaded when it is needed; most drivers are modules. The command modprobe "
     "loads a module, and lsmod lists those that are loaded."),
    (("What is swap?", "What is swap space?"),
     "Swap is space on a disk that the kernel uses when the memory is full. It is much slower than memory."),
    (("What is a language model?", "What is a large language model?", "How do language models work?", "What is an LLM?"),
     "A language model predicts how a text goes on, one token after the other. It learns this from a large amount of text. Large "
     "models can answer questions, write and translate; a small one like me can only imitate the text that it has seen."),
    (("What is a token?", "What are tokens?"),
     "A token is a piece of text, such as a word or a part of a word. Language models read and write text as a sequence of tokens."),
    (("What is a GPU?", "Do I need a GPU?"),
     "A GPU is a processor that does many calculations at once, which suits graphics and neural networks. vllmlite runs without one, "
     "but larger models are much faster on a GPU."),
    (("What is the capital of France?", "Tell me a joke.", "What is the weather like?", "Who is the president?", "Write a poem.",
      "What is the meaning of life?", "What time is it?", "Who won the match?", "Translate this sentence."),
     "I am sorry, I do not know. I am a small demo model that was trained on the documentation of Debian. Ask me something about Debian."),
    (("How do I build a package?", "How do I make a Debian package?", "How can I create a package?", "How do I package software for Debian?"),
     "Write a directory debian with the files control, rules, changelog and copyright beside the source code, and run "
     "dpkg-buildpackage, or sbuild for a clean environment. The Guide for Debian Maintainers shows every step."),
    (("What is debhelper?", "What does debhelper do?", "What is dh?"),
     "debhelper is a set of programs that help to build Debian packages. The command dh runs them in the right order, so that the file "
     "debian/rules needs only a few lines."),
    (("What is debian/control?", "What is the control file?"),
     "The file debian/control describes a source package and the binary packages that are built from it: their names, maintainers, "
     "dependencies and descriptions."),
    (("What is debian/rules?", "What is the rules file?"),
     "The file debian/rules is a makefile that builds the package. With debhelper it can be as short as one rule that calls dh."),
    (("What is the debian/changelog file?", "What is debian/changelog?"),
     "The file debian/changelog lists the changes of each version of a package. The version and the distribution of an upload come "
     "from its first entry."),
    (("What is lintian?", "What does lintian do?"),
     "lintian checks Debian packages for bugs and for violations of Debian Policy. Maintainers run it before they upload a package."),
    (("What is sbuild?", "What does sbuild do?"),
     "sbuild builds Debian packages in a clean environment that has only the packages that the build needs, as Debian's own build "
     "machines do."),
    (("What is autopkgtest?", "What does autopkgtest do?"),
     "autopkgtest runs the tests that a package declares in debian/tests/control, on the installed package. Debian uses it to decide "
     "whether a package may move to testing."),
    (("What is debootstrap?", "What does debootstrap do?", "What is mmdebstrap?"),
     "debootstrap installs a basic Debian system into a directory. mmdebstrap does the same with apt, faster and with several mirrors."),
    (("What is popularity-contest?", "What is popcon?"),
     "popularity-contest reports once a week which packages you use, if you agree. The results help to decide which packages go on "
     "the first installation disc."),
    (("What is unattended-upgrades?", "How do I install updates automatically?"),
     "unattended-upgrades installs security updates and other upgrades on its own. Install the package of that name to use it."),
    (("What is a conffile?", "What is a configuration file?", "What happens to my configuration when a package is upgraded?"),
     "A conffile is a configuration file that comes with a package and that dpkg treats with care. When you have changed it and a new "
     "version of the package brings another one, dpkg asks which of the two you want to keep."),
    (("What is a chroot?", "What does chroot do?"),
     "A chroot is a directory that a program sees as the root of the file system. Debian packages are often built in a chroot, so that "
     "the rest of the system does not influence the build."),
    (("How do I partition a disk?", "What is a partition?", "How do I format a disk?"),
     "A partition is a part of a disk that holds one file system. Use fdisk, parted or the graphical gparted to divide a disk, and "
     "mkfs to create a file system on a partition. Make a backup first, since this destroys data."),
    (("How do I configure a printer?", "How do I set up a printer?", "How do I print?"),
     "Install the package cups and open the page http://localhost:631 in a browser, or use the printer settings of your desktop. Most "
     "modern printers work without a driver."),
    (("How do I list all users?", "Where are the users stored?", "What is /etc/passwd?"),
     "The file /etc/passwd lists all users of the system, one on each line, with their home directories and shells. The command getent "
     "passwd prints the list."),
    (("What is the best editor?", "Which editor should I use?", "What is a text editor?", "How do I edit a file?"),
     "A text editor lets you write and change text files. nano is simple and friendly; vim and emacs are powerful but take time to "
     "learn. On a desktop, try gedit or kate."),
    (("Why is my computer slow?", "How do I find out why my system is slow?", "My computer is slow."),
     "Run top to see which processes use the processor and the memory, df -h to see whether a disk is full, and journalctl to look for "
     "errors."),
    (("Who maintains packages?", "Who maintains the packages in Debian?", "Who makes the packages?"),
     "Each package in Debian has a maintainer, a person or a team, who prepares new versions, fixes bugs and talks to the authors of "
     "the software."),
    (("What is debian/watch?", "What is a debian/watch file?", "What is the watch file?"),
     "The file debian/watch says where new versions of the original software appear. The tool uscan reads it and downloads them."),
    (("What is debian/copyright?", "What is the copyright file?", "Where do I find the licence of a package?"),
     "The file debian/copyright names the authors and the licences of a package. Every installed package has it as "
     "/usr/share/doc/NAME/copyright."),
    (("What is upstream?", "What does upstream mean?", "Who is the upstream author?"),
     "Upstream is the project or the person that writes the original software, before Debian packages it."),
    (("What is an NMU?", "What is a non-maintainer upload?"),
     "A non-maintainer upload is an upload of a package by a developer who is not its maintainer, for example to fix a serious bug."),
    (("What is the Debian Project Leader?", "Who leads Debian?", "What is the DPL?", "How does Debian make decisions?"),
     "The Debian Project Leader represents the project and is elected by the developers for one year. Important decisions are made by "
     "a vote of all developers, as the Debian constitution says."),
    (("What is Salsa?", "What is salsa.debian.org?"),
     "Salsa is Debian's GitLab server. Most packages are developed there, and everyone may propose changes with merge requests."),
    (("What is LTS?", "How long is Debian supported?", "What is long term support?", "How often is Debian released?"),
     "A new stable release of Debian appears about every two years. It gets three years of full support, and two more years of long "
     "term support."),
    (("What is a security advisory?", "What is a DSA?", "Who is the security team?"),
     "The security team of Debian fixes security problems in the stable release and announces each fix in a Debian Security Advisory."),
    (("What is a locale?", "How do I change the language of the system?", "How do I configure the locale?"),
     "A locale is a set of rules for language, dates, numbers and sorting. Run dpkg-reconfigure locales as root to choose those that "
     "you need and the default one."),
    (("How do I change the time zone?", "How do I set the time?", "How do I set the clock?"),
     "Run dpkg-reconfigure tzdata as root, or timedatectl set-timezone with the name of the zone. systemd-timesyncd keeps the clock "
     "right over the network."),
    (("How do I change the hostname?", "What is a hostname?"),
     "The hostname is the name of your computer. Change it with hostnamectl set-hostname NAME, and adapt the file /etc/hosts."),
    (("What is /etc/fstab?", "What is fstab?", "What does mount do?", "How do I mount a disk?"),
     "The command mount attaches a file system to a directory. The file /etc/fstab lists the file systems that are mounted when the "
     "system boots, each with its device, its mount point, its type and its options."),
    (("What are file permissions?", "What is the owner of a file?", "What does chown do?"),
     "Each file has an owner, a group, and permissions that say who may read, write and execute it. chmod changes the permissions, and "
     "chown changes the owner."),
    (("What is a symbolic link?", "What is a symlink?", "What does ln do?"),
     "A symbolic link is a file that points to another file by name. The command ln -s TARGET NAME creates one."),
    (("What is a pipe?", "How do I send the output of a command to another?", "What does the sign | mean?"),
     "A pipe passes the output of one command to the next as its input. For example, ls | less shows a long list one page at a time."),
    (("What is an environment variable?", "What is PATH?", "What is $PATH?"),
     "An environment variable is a named value that programs inherit from the shell. The variable PATH lists the directories in which "
     "the shell looks for commands."),
    (("What is a regular expression?", "What are regular expressions?"),
     "A regular expression is a pattern that describes a set of texts. Tools such as grep and sed use regular expressions to find and "
     "change text."),
    (("What is a shell script?", "How do I write a shell script?", "What is a script?"),
     "A shell script is a text file with commands for the shell. Begin it with the line #!/bin/sh, write one command on each line, and "
     "make it executable with chmod +x."),
    (("What is UEFI?", "What is Secure Boot?", "What is a BIOS?"),
     "UEFI is the firmware of modern computers; it starts the boot loader. With Secure Boot it starts only signed programs. Debian's "
     "boot loader and kernel are signed, so that they work with it."),
    (("What is LVM?", "What is a logical volume?"),
     "LVM is the logical volume manager. It joins disks into groups and divides them into volumes whose sizes you can change later."),
    (("What is RAID?", "What does mdadm do?"),
     "RAID combines several disks so that the data survive when one of them fails, or so that access becomes faster. The tool mdadm "
     "manages RAID in Linux."),
    (("How do I encrypt my disk?", "What is disk encryption?", "What is LUKS?", "What is cryptsetup?"),
     "Choose encrypted LVM in the installer, or use cryptsetup, which sets up encrypted partitions in the LUKS format. Without the "
     "passphrase nobody can read the data."),
    (("What is Wayland?", "What is X11?", "What is the X Window System?", "What is Xorg?"),
     "Wayland and X11 are the two systems by which graphical programs show their windows. X11 is the older one; most desktops in "
     "Debian now use Wayland."),
    (("How do I connect to a wireless network?", "How do I use Wi-Fi?", "How do I set up wifi?"),
     "On a desktop, choose the network in the menu of NetworkManager. In a terminal, use the command nmtui. Some cards need firmware "
     "from the area non-free-firmware."),
    (("My sound does not work.", "How does sound work in Debian?", "What is PipeWire?"),
     "PipeWire is the sound server of Debian's desktops; beneath it, ALSA drives the sound card. Check the volume with pavucontrol or "
     "alsamixer."),
    (("Can I use pip?", "How do I install Python packages?", "What is a virtual environment?", "What is pip?"),
     "Prefer the packages of Debian, whose names begin with python3. For anything else, create a virtual environment with python3 -m "
     "venv and use pip inside it, so that it does not disturb the system."),
    (("What is Flatpak?", "What is a snap?", "Can I install Flatpak applications?"),
     "Flatpak installs applications that bring their own libraries, from sources outside of Debian. Install the package flatpak to use "
     "it; prefer Debian packages where they exist."),
    (("What are reproducible builds?", "What is a reproducible build?"),
     "A build is reproducible if everyone who builds the same source gets exactly the same package. This lets anyone check that a "
     "package really comes from its source."),
    (("What is an architecture?", "What is amd64?", "What is arm64?", "What does arch all mean?"),
     "An architecture is a kind of processor that programs are compiled for. amd64 is that of ordinary computers, and arm64 that of "
     "many smaller ones. Packages with the architecture all work on every one."),
    (("What is DKMS?", "What are kernel headers?", "How do I build a kernel module?"),
     "Kernel headers are the files that are needed to build modules for a kernel. DKMS builds such modules again, automatically, "
     "whenever a new kernel is installed."),
    (("How do I install a newer kernel?", "Which kernel do I have?", "How do I find out my kernel version?"),
     "The command uname -r prints the version of the kernel that runs. Newer kernels are in the backports, in packages whose names "
     "begin with linux-image."),
    (("How do I hold a package?", "How do I prevent a package from being upgraded?", "What is pinning?"),
     "Run apt-mark hold NAME as root, and the package stays as it is; apt-mark unhold NAME lets it go. Pinning, in "
     "/etc/apt/preferences, gives priorities to versions and repositories."),
    (("How do I downgrade a package?", "How do I install an older version?"),
     "Name the version when you install the package:\n\n    apt install NAME=VERSION\n\nDowngrades are not supported in general, so "
     "be careful. Old versions are kept at snapshot.debian.org."),
    (("How do I fix broken packages?", "apt says that packages are broken.", "How do I repair dependencies?"),
     "Run these commands as root:\n\n    dpkg --configure -a\n    apt --fix-broken install\n\nThe first finishes interrupted "
     "installations, and the second installs what is missing."),
    (("How do I free disk space?", "How do I clean up my system?", "What does apt clean do?"),
     "Run apt clean, which removes downloaded packages, and apt autoremove, which removes packages that nothing needs. The command du "
     "shows which directories are large."),
    (("What is the Debian Reference?", "What is the Debian Administrator's Handbook?", "Which book about Debian should I read?"),
     "The Debian Reference is a broad guide to Debian for users, and the Debian Administrator's Handbook teaches its administration. "
     "Both are free, in the packages debian-reference and debian-handbook."),
    (("What is the Debian logo?", "What does the Debian swirl mean?"),
     "The logo of Debian is a red swirl, called the open use logo. It was chosen in a contest in 1999."),
    (("What is a mailing list?", "What is IRC?", "How do I talk to Debian people?"),
     "Debian people talk on mailing lists, which are archived at lists.debian.org, and on IRC, a chat, on the server irc.debian.org. "
     "The list debian-user and the channel #debian are for users."),
    (("What is a DNS server?", "What is DNS?", "What is a domain name?"),
     "DNS is the system that translates names such as www.debian.org into the addresses of computers. A DNS server answers such "
     "questions; bind9 and unbound are two of them."),
    (("What is DHCP?", "What is an IP address?", "What is a network?"),
     "An IP address is the number by which computers reach each other on a network. DHCP is the protocol by which a computer gets its "
     "address automatically."),
    (("What is a mail transport agent?", "What is an MTA?"),
     "A mail transport agent, or MTA, is a program that passes electronic mail from one computer to another. Exim is the default one in "
     "Debian; Postfix is another."),
    (("What is a server?", "What is a client?", "What is a web browser?"),
     "A server is a program, or a computer, that offers a service to others over the network; a client uses it. A web browser, for "
     "example, is a client of web servers."),
    (("What is an algorithm?", "What is a program?", "What is software?", "What is source code?"),
     "A program is a list of instructions for a computer, and software is the word for programs in general. People write programs as "
     "source code, in a programming language; a compiler or an interpreter makes the computer run it."),
    (("What is a bug?", "What is a release critical bug?"),
     "A bug is an error in a program. A release critical bug is one so serious that a package cannot be released with it."),
    (("What is memory?", "What is RAM?", "What is a CPU?", "What is a processor?"),
     "The processor, or CPU, is the part of a computer that carries out the instructions of programs. The memory, or RAM, holds the "
     "programs that run and their data."),
    (("What is cache?", "What is a paged cache?", "What is a KV cache?"),
     "A cache keeps results so that they need not be computed again. The key-value cache of a language model keeps what attention "
     "needs of earlier tokens; vllmlite divides it into pages, or blocks, which requests can share."),
    (("How do I start the server?", "How do I run vllmlite as a server?", "How do I use the API?"),
     "Install the package vllmlite-server and start it:\n\n    systemctl start vllmlite\n\nIt listens on 127.0.0.1, port 8000, with an "
     "interface like that of OpenAI."),
)  # fmt: skip

PROGRAMS: Final[dict[str, str]] = {
    "vim": "a text editor for the terminal, an improved version of the classic editor vi",
    "emacs": "a text editor that can be extended in its own programming language, Emacs Lisp",
    "nano": "a small and friendly text editor for the terminal",
    "openssh-server": "the server part of OpenSSH: it lets people log in to your computer over the network, with all traffic encrypted",
    "openssh-client": "the client part of OpenSSH: it contains ssh, which logs in to another computer, and scp, which copies files",
    "nginx": "a fast web server, which can also pass requests on to other servers and balance the load among them",
    "apache2": "the Apache web server, one of the most widely used web servers",
    "postgresql": "a powerful relational database that is controlled with SQL",
    "mariadb-server": "a relational database that is compatible with MySQL",
    "sqlite3": "a small database that keeps all its data in a single file and needs no server",
    "redis-server": "a fast store of keys and values that keeps its data in memory",
    "firefox-esr": "the web browser Firefox, in the version with extended support",
    "chromium": "a web browser, the free base of Google Chrome",
    "thunderbird": "a graphical program that reads and writes electronic mail",
    "libreoffice": "a free office suite with a word processor, a spreadsheet and programs for presentations and drawings",
    "gimp": "an image editor, with which you can retouch photographs and draw",
    "inkscape": "an editor for vector graphics such as logos and drawings",
    "blender": "a program for three-dimensional modelling, animation and rendering",
    "vlc": "a media player that plays almost every kind of audio and video file",
    "mpv": "a media player that is controlled from the keyboard and the command line",
    "ffmpeg": "a set of tools that record, convert and stream audio and video",
    "git": "a distributed version control system, which records the history of files",
    "mercurial": "a distributed version control system that is easy to use",
    "subversion": "a version control system with one central repository",
    "gcc": "the GNU compiler for the C language",
    "g++": "the GNU compiler for the C++ language",
    "build-essential": "a package that installs the compilers and tools that are needed to build Debian packages",
    "make": "a tool that builds programs by following the rules in a makefile",
    "cmake": "a system that generates the build files of a project for many platforms",
    "gdb": "a debugger, which shows what happens inside a program while it runs",
    "python3": "an interpreter for Python, a programming language that is easy to read and to learn",
    "perl": "an interpreter for Perl, a programming language that is good at working with text",
    "ruby": "an interpreter for Ruby, an object-oriented programming language",
    "nodejs": "a platform that runs JavaScript programs outside of a web browser",
    "golang": "the compiler and the tools of the Go programming language",
    "rustc": "the compiler of Rust, a programming language that is fast and safe with memory",
    "php": "a scripting language that is mostly used to make web pages",
    "curl": "a command line tool that transfers data from and to servers, by HTTP and many other protocols",
    "wget": "a command line tool that downloads files from the web",
    "rsync": "a fast tool that copies files, on one computer or between two, and transfers only what has changed",
    "tar": "a tool that packs many files into one archive, and unpacks them again",
    "zip": "a tool that compresses files into ZIP archives",
    "unzip": "a tool that unpacks ZIP archives",
    "htop": "an interactive viewer of processes for the terminal, with colours and a menu",
    "tmux": "a terminal multiplexer: it keeps several sessions open in one terminal, and lets you leave and come back to them",
    "screen": "a terminal multiplexer that keeps your sessions running when you log out",
    "zsh": "a shell with powerful completion, made for interactive use",
    "fish": "a friendly interactive shell that suggests commands while you type",
    "dash": "a small and fast shell, which Debian uses as /bin/sh",
    "coreutils": "the GNU core utilities, the basic commands such as ls, cp, mv and cat",
    "grep": "a tool that prints the lines of files that match a pattern",
    "sed": "a stream editor, which changes text line by line as it passes",
    "gawk": "the GNU version of awk, a language that processes text by patterns and actions",
    "less": "a program that shows text one page at a time and lets you scroll and search",
    "jq": "a command line tool that filters and changes JSON data",
    "docker.io": "the Docker engine, which runs programs in containers",
    "podman": "a tool that runs containers without a daemon and without root",
    "qemu-system": "an emulator that runs whole virtual machines",
    "virt-manager": "a graphical program that manages virtual machines",
    "ansible": "a tool that configures many computers from one place, over SSH",
    "ufw": "an uncomplicated firewall: a simple way to decide which network connections are allowed",
    "nftables": "the tool that sets up the packet filter, or firewall, of the Linux kernel",
    "fail2ban": "a service that bans addresses after too many failed attempts to log in",
    "wireguard": "a fast and simple virtual private network",
    "openvpn": "a virtual private network that works over an ordinary internet connection",
    "samba": "a file and print server for Windows clients on the network",
    "nfs-kernel-server": "a server that shares directories with other computers over the network",
    "cups": "the printing system: it manages printers and print jobs",
    "bind9": "a name server, which translates the names of computers to addresses",
    "dnsmasq": "a small name server and DHCP server for local networks",
    "exim4": "a mail transport agent, which sends and receives electronic mail",
    "postfix": "a mail transport agent that is fast, secure and easy to administer",
    "dovecot-core": "a mail server that lets users read their mail with IMAP and POP3",
    "network-manager": "a service that manages network connections, wired, wireless and mobile",
    "gnome": "a modern desktop environment that is easy to use, the default one of Debian",
    "kde-plasma-desktop": "the Plasma desktop of KDE, which can be adapted in many ways",
    "xfce4": "a desktop environment that is light and fast",
    "gparted": "a graphical editor of disk partitions",
    "borgbackup": "a backup program that stores equal parts of files only once, compressed and encrypted",
    "restic": "a fast backup program that keeps encrypted copies on many kinds of storage",
    "gnupg": "the GNU privacy guard, which encrypts and signs data",
    "openssl": "a toolkit for encrypted connections and certificates",
    "certbot": "a program that gets certificates for web servers from Let's Encrypt",
    "debhelper": "a set of programs that help to build Debian packages",
    "devscripts": "a collection of scripts that make the life of a Debian maintainer easier",
    "lintian": "a checker that finds bugs and violations of policy in Debian packages",
    "reportbug": "a program that reports bugs in Debian packages",
    "synaptic": "a graphical package manager",
    "apt-file": "a tool that searches for files inside packages, also of those that are not installed",
    "texlive": "a distribution of TeX, the typesetting system",
    "pandoc": "a converter between many formats of documents",
    "hello": "the GNU program that prints a friendly greeting; it serves as an example of a package",
    "cowsay": "a program that draws a cow that says what you tell it",
    "sl": "a joke: it shows a steam locomotive when you mistype the command ls",
    "neofetch": "a tool that shows information about the system beside its logo",
    "tree": "a program that lists the files of directories as a tree",
    "llama.cpp": "a program that runs large language models on ordinary computers",
    "python3-torch": "PyTorch, a library for tensors and neural networks",
    "python3-numpy": "NumPy, a library for fast numerical arrays in Python",
}
"""Well-known packages and a phrase for each that follows "NAME is"."""

PARAGRAPHS: Final = (
    "To install a package, become root and run apt install with the name of the package. apt downloads the package from a repository, "
    "together with everything that it depends on, checks the signatures, and lets dpkg unpack and configure it. After that you can use "
    "the program at once.",
    "To remove a package, run apt remove with its name. Its configuration files stay on the disk, in case you install it again; apt "
    "purge removes them as well.",
    "To upgrade the system, first run apt update, which fetches the new lists of packages, and then apt upgrade, which installs the new "
    "versions. Do this often, because many upgrades repair security problems.",
    "The Linux kernel is the central part of a Debian system. It drives the hardware, shares the processor and the memory among the "
    "programs, and keeps them apart from each other. The first version was written by Linus Torvalds in 1991; today thousands of "
    "people develop it.",
    "When the system boots, the firmware starts the boot loader, and the boot loader loads the kernel and a small initial file system. "
    "The kernel finds the hardware and mounts the root file system. Then it starts systemd, which brings up the services, and at the end "
    "you can log in.",
    "When you log in, the system starts a shell or a desktop for you. Your files are in your home directory, and the settings of your "
    "programs are in hidden files there.",
    "The package manager keeps a record of all installed packages and of the files that belong to them. This is why a package can be "
    "removed without leaving anything behind, and why two packages cannot silently overwrite each other's files.",
    "The Debian Project is an association of volunteers who work together to make a free operating system. They live all over the "
    "world and meet on mailing lists, on IRC and, once a year, at a conference called DebConf.",
    "The history of Debian began on 16 August 1993, when Ian Murdock announced a new distribution that would be made openly, by a "
    "community. The first stable release that carried a name, buzz, appeared in 1996. Since then, each release has been named after a "
    "character from the Toy Story films.",
    "Free software is about freedom: the freedom to run a program, to study it, to change it, and to share it with others. Debian "
    "promises in its Social Contract that the system will remain entirely free.",
    "Linux is a kernel, and many people use the same word for the whole system around it. A complete system also needs a shell, tools, "
    "libraries and applications, and this is what a distribution such as Debian provides.",
    "Security is important on every computer. Install updates promptly, choose good passwords, and do not run services that you do not "
    "need. Debian's security team watches for problems in the stable release and publishes fixes for them.",
    "The shell reads the commands that you type and runs them. A command has a name and arguments; options, which begin with a dash, "
    "change what it does. Several commands can be joined by pipes, so that one works on the output of another.",
    "The file system is a tree of directories that begins at the root, which is written as a slash. Programs are in /usr, configuration "
    "is in /etc, data that change are in /var, and the files of users are in /home.",
    "The network connects your computer with others. Each computer has an address, and names such as www.debian.org are translated to "
    "addresses by name servers. In Debian, NetworkManager or systemd-networkd sets up the connections.",
    "A good bug report says what you did, what you expected, and what happened instead. It names the version of the package, and it "
    "shows the exact message of the program. The tool reportbug collects much of this for you.",
    "A Debian package is built from source. The maintainer writes a few files in the directory debian: control, which describes the "
    "package, rules, which builds it, changelog, which lists its history, and copyright, which names its licences.",
    "The stable release is for those who want a system that simply works. The testing distribution becomes the next stable release, and "
    "unstable is where the developers upload their new versions every day.",
    "Language models predict the next token of a text from the tokens before it. A small model like this one fits into a few "
    "megabytes and answers in a moment; a large one knows far more, but needs a powerful computer.",
    "vllmlite runs language models. It puts many requests into one batch, keeps their keys and values in a paged cache, and shares the "
    "blocks that begin alike. You can use it from Python, from the command line, or through a server.",
    "Once upon a time, there was a computer that nobody could repair, because its programs were a secret. Then a student wrote a "
    "letter to the whole world and asked for help to make a system that everyone may study and change. Many people answered, each "
    "brought a package, and they put the packages together. They called the system Debian, and it has been free ever since.",
    "Hello, my name is Debian. I am a free operating system, and I was made by volunteers from all over the world. I run on small "
    "computers and on large ones, and I am glad that you are here.",
    "Hello, world! This is the demo model of vllmlite. It is small, but it runs everywhere, and it speaks a little about Debian.",
    "The best way to learn Debian is to use it. Install it on an old computer, read the manual pages, try the commands, and do not be "
    "afraid to make mistakes. When you are stuck, ask on a mailing list: somebody will help you.",
    "The quick brown fox jumps over the lazy dog. This sentence contains every letter of the English alphabet, and people use it to "
    "try out fonts and keyboards.",
    "In the beginning there was the command line. You typed a command, the computer did what you asked, and it said nothing if all "
    "went well. Graphical desktops came later, but many people still like the command line because it is quick and precise.",
    "Python is a programming language that is easy to read. Many tools in Debian are written in it, and thousands of its modules are "
    "available as packages whose names begin with python3.",
    "A computer consists of a processor, memory, disks and devices. The operating system makes them work together, so that programs "
    "need not know the details of the hardware.",
    "The meaning of open source is simple: the source code of a program is there for everyone to read. People can check what it does, "
    "repair it, and make it better.",
    "There are many ways to help Debian. You can report bugs, answer questions, translate texts, write documentation, draw pictures, or "
    "maintain a package. Every contribution counts.",
)
"""A few paragraphs of plain prose, whose beginnings the model can continue."""
