"""The numbers of Linux's input events that the devices here know.

From the kernel's include/uapi/linux/input-event-codes.h, which virtio 1.2, 5.8 takes over; the
names are its own, in lower case and without the prefix.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "ABS_X",
    "ABS_Y",
    "BUS_VIRTUAL",
    "BUTTONS",
    "CHARACTERS",
    "EV_ABS",
    "EV_KEY",
    "EV_LED",
    "EV_REL",
    "EV_REP",
    "EV_SYN",
    "KEYS",
    "LEDS",
    "REL_HWHEEL",
    "REL_WHEEL",
    "REL_X",
    "REL_Y",
    "REP_DELAY",
    "REP_PERIOD",
    "SYN_REPORT",
]

# Types of events.
EV_SYN: Final = 0x00
EV_KEY: Final = 0x01
EV_REL: Final = 0x02
EV_ABS: Final = 0x03
EV_LED: Final = 0x11
EV_REP: Final = 0x14

SYN_REPORT: Final = 0
REL_X: Final = 0x00
REL_Y: Final = 0x01
REL_HWHEEL: Final = 0x06
REL_WHEEL: Final = 0x08
ABS_X: Final = 0x00
ABS_Y: Final = 0x01
REP_DELAY: Final = 0x00
REP_PERIOD: Final = 0x01

BUS_VIRTUAL: Final = 0x06

#: LED_NUML, LED_CAPSL, LED_SCROLLL.
LEDS: Final = {"num": 0x00, "caps": 0x01, "scroll": 0x02}

#: BTN_LEFT and those behind it.
BUTTONS: Final = {
    "left": 0x110,
    "right": 0x111,
    "middle": 0x112,
    "side": 0x113,
    "extra": 0x114,
}

# Names of keys, the first of which has number 1; "-" where there is none. The header's aliases
# are left out.
_KEYS: Final = """
esc 1 2 3 4 5 6 7 8 9 0 minus equal backspace tab q w e r t y u i o p leftbrace rightbrace
enter leftctrl a s d f g h j k l semicolon apostrophe grave leftshift backslash z x c v b n
m comma dot slash rightshift kpasterisk leftalt space capslock f1 f2 f3 f4 f5 f6 f7 f8 f9
f10 numlock scrolllock kp7 kp8 kp9 kpminus kp4 kp5 kp6 kpplus kp1 kp2 kp3 kp0 kpdot -
zenkakuhankaku 102nd f11 f12 ro katakana hiragana henkan katakanahiragana muhenkan kpjpcomma
kpenter rightctrl kpslash sysrq rightalt linefeed home up pageup left right end down
pagedown insert delete macro mute volumedown volumeup power kpequal kpplusminus pause scale
kpcomma hangeul hanja yen leftmeta rightmeta compose stop again props undo front copy open
paste find cut help menu calc setup sleep wakeup file sendfile deletefile xfer prog1 prog2
www msdos coffee rotate_display cyclewindows mail bookmarks computer back forward closecd
ejectcd ejectclosecd nextsong playpause previoussong stopcd record rewind phone iso config
homepage refresh exit move edit scrollup scrolldown kpleftparen kprightparen new redo f13
f14 f15 f16 f17 f18 f19 f20 f21 f22 f23 f24 - - - - - playcd pausecd prog3 prog4
all_applications suspend close play fastforward bassboost print hp camera sound question
email chat search connect finance sport shop alterase cancel brightnessdown brightnessup
media switchvideomode kbdillumtoggle kbdillumdown kbdillumup send reply forwardmail save
documents battery bluetooth wlan uwb unknown video_next video_prev brightness_cycle
brightness_auto display_off wwan rfkill micmute
"""

#: KEY_ESC to KEY_MICMUTE: all that a keyboard may have below the first button.
KEYS: Final = {name: number for number, name in enumerate(_KEYS.split(), start=1) if name != "-"}

# Of a keyboard as the United States have it: what stands on the keys, without and with Shift.
_PLAIN: Final = "1234567890-=qwertyuiop[]asdfghjkl;'`\\zxcvbnm,./ \n\t"
_SHIFTED: Final = '!@#$%^&*()_+QWERTYUIOP{}ASDFGHJKL:"~|ZXCVBNM<>?'
_ON_KEYS: Final = (
    *"1234567890",
    *("minus", "equal"),
    *"qwertyuiop",
    *("leftbrace", "rightbrace"),
    *"asdfghjkl",
    *("semicolon", "apostrophe", "grave", "backslash"),
    *"zxcvbnm",
    *("comma", "dot", "slash", "space", "enter", "tab"),
)

#: The keys that give a character, those held down first.
CHARACTERS: Final[dict[str, tuple[str, ...]]] = {
    **{plain: (key,) for plain, key in zip(_PLAIN, _ON_KEYS, strict=True)},
    **{shifted: ("leftshift", key) for shifted, key in zip(_SHIFTED, _ON_KEYS, strict=False)},
}
