-- The key of a conversation: the text that every turn of it begins with, taken from a request's body in the forms of
-- all routes. A function of the request alone, so that any number of balancers agree on it, before and after a restart.
-- Looks at the first 64 KiB, of which a longer body has no less in a later turn, and at nothing behind the first turn.

local WINDOW = 65536
local PROMPT = 256 -- bytes of a raw prompt, which has no turns; a shorter one has nothing in a cache worth returning to

local MARKS = 10000 -- brackets, braces and strings of one value, and
local ITEMS = 1000 -- of one list or object: more are not looked at, since that takes time, which is all clients'

local QUOTE, BRACE, BRACKET = ('"{['):byte(1, 3)
local find, byte = string.find, string.byte

local INSTRUCTIONS = { system = true, instructions = true }
local TURNS = { messages = true, input = true }
local BEFORE_FIRST_TURN = { system = true, developer = true }

-- Where the string ends that begins at `at`; nil if it is cut.
local function string_end(text, at)
  while true do
    at = find(text, '["\\]', at + 1)
    if not at or byte(text, at) == QUOTE then
      return at
    end
    at = at + 1 -- what is behind a backslash ends nothing
  end
end

-- Where the value ends that begins at `at`; nil if it is cut, or has too many marks.
local function value_end(text, at)
  if find(text, '^[^"%[{]', at) then
    local behind = find(text, "[%s,%]}]", at)
    return behind and behind - 1
  end
  local depth = 0
  for _ = 1, MARKS do
    local mark = byte(text, at)
    if mark == QUOTE then
      at = string_end(text, at)
    elseif mark == BRACE or mark == BRACKET then
      depth = depth + 1
    else
      depth = depth - 1
    end
    if not at or depth == 0 then
      return at
    end
    at = find(text, '["%[%]{}]', at + 1)
    if not at then
      return nil
    end
  end
end

-- The members of the object, or the items of the list, that begins at `at`: name ("" in a list), first and last place.
-- The last one may be cut: then it goes to the end of the text.
local function children(text, at)
  local is_object = text:sub(at, at) == "{"
  local count = 0
  return function()
    count = count + 1
    at = at and text:find("[^%s,]", at + 1)
    if not at or count > ITEMS or text:find("^[%]}]", at) then
      return nil
    end
    local name = ""
    if is_object then
      local last = string_end(text, at)
      if not last then
        return nil
      end
      name = text:sub(at + 1, last - 1)
      at = text:match("^%s*:%s*()", last + 1)
      if not at or at > #text then
        return nil
      end
    end
    local first = at
    at = value_end(text, at)
    return name, first, at or #text
  end
end

-- The words of a content: those of a text, of a list of texts and parts, or of one part. A part's other fields do not
-- count: a mark that caching ends here wanders from turn to turn. The line by which Claude Code bills changes with each.
local function words(text, first, last)
  local opening = text:sub(first, first)
  if opening == '"' then
    local all = text:sub(first + 1, last - 1)
    return all:find("^x%-anthropic%-billing%-header") and "" or all
  end
  local found = {}
  if opening == "[" then
    for _, from, to in children(text, first) do
      found[#found + 1] = words(text, from, to)
    end
  elseif opening == "{" then
    for name, from, to in children(text, first) do
      if name == "text" then
        found[#found + 1] = words(text, from, to)
      end
    end
  end
  return table.concat(found)
end

-- The words of turns up to the first that is not the system's. A text is the one turn that it stands for.
local function first_turns(text, first, last)
  if text:sub(first, first) ~= "[" then
    return words(text, first, last)
  end
  local found = {}
  for _, from, to in children(text, first) do
    local role = ""
    if text:sub(from, from) ~= "{" then
      found[#found + 1] = text:sub(from, to)
    else
      for name, inner_from, inner_to in children(text, from) do
        if name == "role" then
          role = text:sub(inner_from + 1, inner_to - 1)
        elseif name == "content" then
          found[#found + 1] = words(text, inner_from, inner_to)
        end
      end
    end
    if not BEFORE_FIRST_TURN[role] then
      break
    end
  end
  return table.concat(found)
end

-- What stands behind the turns in the body is left out: turns become more, and would push it out of the window.
local function key(body)
  local start = body:find("[^%s]")
  if not start or body:sub(start, start) ~= "{" then
    return ""
  end
  local instructions = ""
  for name, first, last in children(body, start) do
    if TURNS[name] then
      return instructions .. first_turns(body, first, last)
    elseif name == "prompt" then
      return body:sub(first, math.min(last, first + PROMPT))
    elseif INSTRUCTIONS[name] then
      instructions = instructions .. words(body, first, last)
    end
  end
  -- The turns begin behind the window: what is before them, such as the tools, has to do.
  return #body == WINDOW and body or instructions
end

core.register_converters("conversation", function(body)
  return key(body:sub(1, WINDOW))
end)
